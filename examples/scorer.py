"""A scorer of your own: a language model whose score is the log-odds of Yes against No after the response.

In YAML `scorer: {class_path: examples.scorer.YesNo}`. The trained model is an ordinary causal model; `stage.json` names
the scorer, so that `rlhf score`, `rlhf evaluate` and the reward of RL use it if it can be imported.
"""

import sys

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from rlhf_lightning import PreferenceDataModule, PreferenceModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.models.scorers import LoadedModel, ModelScorer, Scorer
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.types import PreferenceTokens


class YesNo(Scorer):
    """A generative reward model without a new head: log P(yes) - log P(no) as the next token after the response.

    Args:
        yes: Word of approval; only its first token is used.
        no: Word of rejection; only its first token is used.
    """

    task = "CAUSAL_LM"

    def __init__(self, yes: str = "Yes", no: str = "No") -> None:
        self.yes, self.no = yes, no

    def build(self, loaded: LoadedModel) -> ModelScorer:
        """Create the object that scores with the loaded model."""
        words = [loaded.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (self.yes, self.no)]
        if words[0] == words[1]:
            raise ConfigError(f"YesNo: {self.yes!r} and {self.no!r} begin with the same token; name others")
        return YesNoScores(TokenLogprobs(loaded.model, loaded.max_tokens_per_batch), words)


class YesNoScores(ModelScorer):
    """The scores of `YesNo`."""

    def __init__(self, token_logprobs: TokenLogprobs, words: list[int]) -> None:
        super().__init__(token_logprobs.packed_forward)
        self.token_logprobs, self.words = token_logprobs, words

    def __call__(self, batch: PreferenceTokens) -> Tensor:
        """Scores `[N]` of `input_ids` `[N, T]`; the responses end at `lengths` `[N]`."""
        ids, ends = batch["input_ids"], batch["lengths"].repeat(2)[:, None]
        words = torch.tensor(self.words, device=ids.device).repeat_interleave(len(ids))[:, None]
        rows = nn.functional.pad(ids, (0, 1)).repeat(2, 1).scatter(1, ends, words)
        loss_mask = torch.zeros(rows.shape, device=ids.device).scatter(1, ends, 1.0)
        # The two rows of a response differ only in their last token; the rest is computed once.
        yes, no = self.token_logprobs(rows, loss_mask).logprobs.sum(-1).chunk(2)
        return yes - no


def main(model: str, folder: str = "runs/examples/yes_no") -> Tensor:
    """Train on a pair, and score with the saved model."""
    pairs = [{"prompt": "Is it raining?", "chosen": "Yes, take a coat.", "rejected": "Weather is a big topic."}]
    trainer = pl.Trainer(
        max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False, callbacks=[ExportModel()]
    )
    trainer.fit(PreferenceModule(model, YesNo()), PreferenceDataModule(pairs))
    return RewardModel(f"{folder}/model").score([pairs[0]["prompt"]] * 2, [pairs[0]["chosen"], pairs[0]["rejected"]])


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
