"""The three modules alone and with the Trainer: invariances, resume, passing on of models."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from rlhf_lightning import (
    PreferenceModule,
    PromptDataModule,
    SFTModule,
)
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.diagnostics.invariants import FirstStepInvariants
from rlhf_lightning.environments.base import StepResult
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.scorers import RewardHead, SequenceLogprob
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.rewards import FunctionReward, ModelReward
from rlhf_lightning.rollout.advantages import LeaveOneOut
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.settings import arguments
from tests.helpers.environments import PromptEnv
from tests.helpers.models import build_model
from tests.helpers.modules import data, make, same, vowels, weights
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.training import sgd, trainer

KINDS = ["sft", "preference", "policy"]


@pytest.mark.parametrize("kind", KINDS)
def test_fit_validate_test_predict(kind: str, base: str, tmp_path: Path) -> None:
    module = make(kind, base)
    rows = {"sft": chats, "preference": pairs, "policy": prompts}[kind](4)
    source = data(kind)
    source.sources |= {"test": rows, "predict": rows}
    run = trainer(tmp_path)
    run.fit(module, source)
    assert run.global_step == {"sft": 3, "preference": 3, "policy": 3}[kind]
    found = run.validate(module, source, verbose=False)[0]
    wanted = {
        "sft": {"val/nll", "val/perplexity", "val/bits_per_byte", "val/tokens"},
        "preference": {"val/accuracy", "val/loss", "val/margin", "val/chosen_score", "val/rejected_score"},
        "policy": {"val/reward_greedy", "val/reward_sampled", "val/response_tokens", "val/truncated"},
    }[kind]
    tested = {name.replace("test/", "val/") for name in run.test(module, source, verbose=False)[0]}
    for names in (set(found), tested):  # preference reports by parts of the data as well
        assert names >= wanted if kind == "preference" else names == wanted
    (batches,) = [run.predict(module, source)]
    assert batches is not None
    rows = [row for batch in batches for row in batch]  # type: ignore[union-attr]
    assert len(rows) == 4
    assert set(rows[0]) >= (
        {"chosen_score", "rejected_score"} if kind == "preference" else {"prompt", "response", "stop_reason"}
    )


@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("size", [16, 13])
def test_accumulated_batches_equal_one_large_batch(kind: str, size: int, base: str, tmp_path: Path) -> None:
    results = []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        module = make(kind, base, dtype="float64")
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=2, precision="64-true")
        torch.manual_seed(0)  # the reward head's first weights
        run.fit(module, data(kind, size, batch))
        results.append(weights(module))
    same(results[0], results[1], rtol=1e-6, atol=1e-9)
    same(results[0], results[2], rtol=1e-6, atol=1e-9)


def test_accumulated_mini_batches_equal_one_large_batch_in_policy_rl(base: str, tmp_path: Path) -> None:
    results = []
    for minibatches, accumulate in ((1, 1), (4, 4), (4, 2)):
        module = make("policy", base, dtype="float64", kl=KLPenalty(0.1))
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, precision="64-true")
        run.fit(module, data("policy", 8, minibatches=minibatches))
        results.append(weights(module))
    same(results[0], results[1], rtol=1e-6, atol=1e-9)
    with pytest.raises(AssertionError):  # two steps a round are not one
        same(results[0], results[2], rtol=1e-6, atol=1e-9)


class Losses(Callback):
    """Writes the loss of each optimizer step on this rank to a file, since the memory of a forked run is lost."""

    def __init__(self) -> None:
        self.curve: dict[int, float] = {}

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning has divided by the number of micro-batches.
        step = batch_idx // run.accumulate_grad_batches + run.current_epoch * 1000
        self.curve[step] = self.curve.get(step, 0.0) + float(outputs["loss"])

    def on_train_end(self, run: Any, module: Any) -> None:
        Path(run.default_root_dir).mkdir(exist_ok=True)
        torch.save(list(self.curve.values()), Path(run.default_root_dir) / f"losses{run.global_rank}.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_micro_batches_equal_one_large_batch(kind: str, base: str, tmp_path: Path) -> None:
    """1 rank × 8, 2 × 4, 2 × 2 × 2 micro-batches: equal losses and weights, with rows of different lengths."""
    from safetensors.torch import load_file

    models, curves = [], []
    for devices, batch, accumulate in ((1, 8, 1), (2, 4, 1), (2, 2, 2)):
        torch.manual_seed(0)
        module = make(kind, base, dtype="float64", **({"kl": KLPenalty(0.1)} if kind == "policy" else {}))
        root = tmp_path / f"{devices}x{batch}x{accumulate}"
        run = trainer(
            root,
            devices=devices,
            strategy="ddp_fork" if devices == 2 else "auto",
            accumulate_grad_batches=accumulate,
            precision="64-true",
            max_epochs=2,
            callbacks=[Losses(), ExportModel()],
        )
        source = data("policy", 7, minibatches=accumulate) if kind == "policy" else data(kind, 19, batch)
        run.fit(module, source)
        models.append(load_file(root / "model" / "model.safetensors"))
        if kind == "sft":
            facts = json.loads((root / "stage.json").read_text())
            models[-1]["metric"] = torch.tensor(facts["metrics"]["val/nll"])
        ranks = [torch.tensor(torch.load(root / f"losses{rank}.pt")) for rank in range(devices)]
        curves.append(torch.stack(ranks).mean(0))
    for model, curve in zip(models[1:], curves[1:], strict=True):
        same(models[0], model, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(curves[0], curve, rtol=1e-6, atol=1e-6)


def sometimes(completions: list[str], wanted: list[int]) -> list[float | None]:
    return [None if value % 2 else 1.0 for value in wanted]


def test_rank_without_episodes_or_scores_does_not_hang(base: str, tmp_path: Path) -> None:
    module = make("policy", base, rewards=[FunctionReward(vowels), FunctionReward(sometimes)])
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", callbacks=[ExportModel()])
    run.fit(module, data("policy", 5, prompts_per_round=4))
    assert json.loads((tmp_path / "stage.json").read_text())["steps"] == 2


@pytest.mark.parametrize("scorer", [RewardHead(), SequenceLogprob()])
def test_reward_model_with_another_tokenizer_scores_the_text(scorer: Any, tmp_path: Path, base: str) -> None:
    from rlhf_lightning.quickstart.model import make_tokenizer

    other = make_tokenizer(["quite another text for quite another tokenizer"] * 3)
    judge = PreferenceModule(build_model(other, seed=3, task=scorer.task), scorer=scorer, tokenizer=other)
    judge.save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / "stage.json").write_text(json.dumps(judge.stage_facts()))
    reward = ModelReward(str(tmp_path / "rm"))
    module = make("policy", base, rewards=[reward], sampler=Sampler(max_tokens=3))
    trainer(tmp_path).fit(module, data("policy", 4))
    assert not module.reward_terms[0].scorer.by_tokens
    for episode in module.last_episodes:
        if episode.response:
            wanted = judge.score([episode.prompt], [episode.response])[0]
            assert episode.terms["reward_model"] == pytest.approx(float(wanted), abs=1e-4)
        else:
            assert episode.terms["reward_model"] is not None


def test_reward_model_scores_the_last_response() -> None:
    from rlhf_lightning.rewards.model import last_turn
    from rlhf_lightning.types import Episode, TrainingSample

    row = TrainingSample([1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 1, 0], [0.0] * 6)
    assert last_turn(Episode([], {}, 0, training_samples=[row])) == ([1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    unanswered = TrainingSample([7, 8], [0, 0], [0.0] * 2)
    assert last_turn(Episode([], {}, 0, training_samples=[row, unanswered]))[0] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("every_comparison")
@pytest.mark.parametrize(
    ("accumulate", "kind"),
    [(1, "sft"), (1, "preference"), pytest.param(1, "policy", marks=pytest.mark.slow), *((2, kind) for kind in KINDS)],
)
def test_interrupted_run_equals_an_uninterrupted_run_exactly(
    kind: str, accumulate: int, base: str, tmp_path: Path
) -> None:
    def fit(folder: str, resume: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)  # the reward head's first weights
        module = make(
            kind,
            base,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            lr_scheduler=lambda optimizer: Warmup(optimizer, warmup_steps=2),
        )
        source = data(kind, 12, 2) if kind != "policy" else data(kind, 12, minibatches=2, update_epochs=2)
        run = trainer(
            tmp_path / folder,
            accumulate_grad_batches=accumulate,
            max_epochs=2,
            callbacks=[ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
            enable_checkpointing=True,
            gradient_clip_val=1.0,
        )
        run.fit(module, source, ckpt_path=resume, weights_only=True)
        return module, run

    whole, run = fit("whole")
    steps = run.global_step
    # After the first step, at the end of an epoch, in the next one, before the last step. tests/checkpointing has all.
    for stop in (1, steps // 2, steps // 2 + 1, steps - 1):
        resumed, again = fit(f"resumed{stop}", tmp_path / "whole" / f"step={stop}.ckpt")
        assert again.global_step == steps
        same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    "flags",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"max_steps": 2},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
        {"max_time": "00:00:10:00"},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_flags(kind: str, flags: dict[str, Any], base: str, tmp_path: Path) -> None:
    module = make(kind, base)
    run = trainer(tmp_path, **flags)
    run.fit(module, data(kind))
    assert run.global_step > 0


# -- SFT --------------------------------------------------------------------------------------------------------------


def test_sft_learns_and_logs_correct_metrics(base: str, tmp_path: Path) -> None:
    module = make("sft", base, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    source = data("sft")
    run = trainer(tmp_path, max_epochs=15)
    first = run.validate(module, source, verbose=False)[0]
    run.fit(module, source)
    last = run.validate(module, source, verbose=False)[0]
    assert last["val/nll"] < first["val/nll"] / 4
    rows = source.prepared["validation"].rows
    nats = tokens = 0.0
    for row in rows:
        logits = module.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for t, flag in enumerate(row.loss_mask):
            nats -= float(logits[t - 1, row.ids[t]].detach()) * flag
            tokens += flag
    assert last["val/nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert last["val/perplexity"] == pytest.approx(2.718281828 ** (nats / tokens), rel=1e-4)
    wanted = nats / 0.6931471805599453 / sum(row.text_bytes for row in rows)
    assert last["val/bits_per_byte"] == pytest.approx(wanted, rel=1e-5)


def test_modules_work_with_any_dataloader(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    ids = torch.randint(3, len(tokenizer), (6, 8))
    batches = [{"input_ids": ids[i : i + 2], "loss_mask": torch.ones(2, 8)} for i in (0, 2, 4)]
    module = SFTModule(model, tokenizer=tokenizer, optimizer=sgd(0.1))
    before = weights(module)
    trainer(tmp_path).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert before.keys() <= weights(module).keys()
    alone = SFTModule(build_model(tokenizer), tokenizer=tokenizer)
    alone.configure_model()
    wanted = -alone.token_logprobs(batches[0]["input_ids"], batches[0]["loss_mask"]).logprobs.sum() / 14
    loss = torch.nn.functional.cross_entropy(alone.model(ids[:2]).logits[:, :-1].flatten(0, 1), ids[:2, 1:].flatten())
    torch.testing.assert_close(wanted, loss)


def test_schedule() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Warmup(optimizer, shape="linear", warmup_steps=3, floor=0.1)
    schedule.set_total_steps(13)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[8] == pytest.approx(0.55)
    assert rates[13] == pytest.approx(0.1)


# -- preference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", [RewardHead, SequenceLogprob])
def test_preference_learns(scorer: Any, base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make("preference", base, scorer=scorer(), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    run = trainer(tmp_path, max_epochs=8)
    run.fit(module, data("preference", 24))
    assert run.validate(module, data("preference", 24), verbose=False)[0]["val/accuracy"] == 1.0


@pytest.mark.parametrize("scorer", [RewardHead(), SequenceLogprob(), SequenceLogprob(length_normalized=True, beta=2.0)])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target=["all"])])
def test_scores_are_equal_in_training_after_saving_and_in_rl(scorer: Any, lora: Any, base: str, tmp_path: Path) -> None:
    """In a training batch, alone, through `score`, after saving, and as the reward of RL."""
    torch.manual_seed(0)
    module = make("preference", base, scorer=type(scorer)(**arguments(scorer)), lora=lora, optimizer=sgd(0.5))
    source = data("preference", 6)
    run = trainer(tmp_path / "rm", callbacks=[ExportModel()])
    run.fit(module, source)
    rows = source.prepared["train"].rows
    batch = source.collate(rows, [1.0] * len(rows))
    with torch.no_grad():
        trained = module.model_scorer(batch)[: len(rows)]
    texts = [row["prompt"] for row in pairs(6)], [row["chosen"] for row in pairs(6)]
    same_scores = [module.score(*texts)]
    alone = [module.score([p], [r])[0] for p, r in zip(*texts, strict=True)]
    same_scores.append(torch.stack(alone))
    policy = make("policy", base, rewards=[ModelReward(str(tmp_path / "rm" / "model"))])
    policy.configure_model()
    judge = policy.reward_terms[0].scorer
    assert judge.by_tokens
    same_scores.append(judge.judge.score(*texts))
    same_scores.append(judge.judge.score_tokens([r.chosen.ids for r in rows], [r.chosen.loss_mask for r in rows]))
    for scores in same_scores:
        torch.testing.assert_close(scores, trained, rtol=1e-5, atol=1e-5)
    if isinstance(scorer, RewardHead):
        _opens_in_stock_libraries(tmp_path / "rm" / "model", lora, rows, trained)


def _opens_in_stock_libraries(folder: Path, lora: Any, rows: list[Any], wanted: torch.Tensor) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    stock = AutoPeftModelForSequenceClassification if lora else AutoModelForSequenceClassification
    options = {"num_labels": 1} if lora else {}
    model = stock.from_pretrained(folder, **options).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    model.config.pad_token_id = pad
    for row, score in zip(rows, wanted, strict=True):
        with torch.no_grad():
            found = model(torch.tensor([row.chosen.ids])).logits[0, 0]
        torch.testing.assert_close(found, score, rtol=1e-5, atol=1e-5)


def test_frozen_backbone(base: str, tmp_path: Path) -> None:
    module = make("preference", base, freeze_backbone=True)
    module.configure_model()
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    assert [name for name, p in module.model.named_parameters() if p.requires_grad] == ["score.weight"]
    trainer(tmp_path).fit(module, data("preference"))
    changed = [name for name, p in module.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["score.weight"]
    with pytest.raises(ConfigError, match="freeze_backbone"):
        make("preference", base, freeze_backbone=True, scorer=SequenceLogprob())


# -- policy RL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_first_step_invariants(place: str, base: str, tmp_path: Path) -> None:
    seen = []

    class Watch(FirstStepInvariants):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(run, module, outputs, batch, batch_idx)
            seen.append((batch["first"], float(outputs["log_ratio_max"]), batch["statistics"]))

    module = make("policy", base, kl=KLPenalty(0.1, place=place))
    trainer(tmp_path, callbacks=[Watch(strict=True)]).fit(module, data("policy", 8, update_epochs=2))
    assert seen[0][2]["kl"] == pytest.approx(0, abs=1e-4)
    assert all(ratio <= 1e-4 for first, ratio, _ in seen if first)
    assert any(ratio > 1e-4 for first, ratio, _ in seen if not first)


def test_invariants_detect_a_sampler_that_disagrees(base: str, tmp_path: Path) -> None:
    module = make("policy", base)
    module.configure_model()
    plain = module.collector.training_samples
    module.collector.training_samples = lambda episodes: [_shift(row) for row in plain(episodes)]
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        trainer(tmp_path, callbacks=[FirstStepInvariants(strict=True)]).fit(module, data("policy"))


def _shift(row: Any) -> Any:
    row.sampling_logprobs = [
        value - 0.01 * flag for value, flag in zip(row.sampling_logprobs, row.loss_mask, strict=True)
    ]
    return row


def first_letter(completions: list[str]) -> list[float]:
    return [float(text[:1].lower() in "aeiou") for text in completions]


@pytest.mark.parametrize("options", [{}, {"advantage": LeaveOneOut()}, {"lora": LoRA(rank=4, target=["all"])}])
def test_policy_learns_a_reward(options: dict[str, Any], base: str, tmp_path: Path) -> None:
    module = make(
        "policy",
        base,
        rewards=[FunctionReward(first_letter)],
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        **options,
    )
    source = data("policy", 64, prompts_per_round=8, group_size=8)
    run = trainer(tmp_path, max_epochs=3)
    before = run.validate(module, source, verbose=False)[0]["val/reward_sampled"]
    run.fit(module, source)
    assert run.validate(module, source, verbose=False)[0]["val/reward_sampled"] == 1.0 > before


def test_rewards_are_weighted_and_logged_separately(base: str, tmp_path: Path) -> None:
    def wanted(prompts: list[Any], completions: list[str], wanted: list[int]) -> list[float | None]:
        return [None if w == 0 else float(w) for w in wanted]

    module = make("policy", base, rewards=[FunctionReward(vowels, 2.0), FunctionReward(wanted, 0.5)])
    source = data("policy", 4)
    trainer(tmp_path).fit(module, source)
    for episode in module.last_episodes:
        parts = episode.terms
        other = 0.0 if parts["wanted"] is None else 0.5 * parts["wanted"]
        assert episode.reward == pytest.approx(2 * parts["vowels"] + other)
        assert (parts["wanted"] is None) == (episode.row["wanted"] == 0)


class Guess(PromptEnv):
    """An environment of three turns, with async steps and an intermediate reward."""

    async def step(self, message: dict[str, Any]) -> StepResult:
        self.turn += 1
        return StepResult(0.5, self.turn == 3, [{"role": "user", "content": f"again {self.turn}"}], {"turn": self.turn})


def test_multi_turn_rl_trains_on_the_sampled_tokens(base: str, tokenizer: Any, tmp_path: Path) -> None:
    module = make("policy", base, environment=Guess, rewards=[], sampler=Sampler(max_tokens=5))
    trainer(tmp_path).fit(module, data("policy", 4))
    episodes = module.last_episodes
    assert len(episodes) == 8
    whole = [episode for episode in episodes if not episode.truncated]
    for episode in episodes:
        assert episode.environment_reward == 0.5 * sum(m["role"] == "assistant" for m in episode.responses)
        for training_sample in episode.training_samples:
            lengths = {
                len(training_sample.ids),
                len(training_sample.loss_mask),
                len(training_sample.sampling_logprobs),
                len(training_sample.advantages),
            }
            assert len(lengths) == 1
            assert all(
                flag or not logprob
                for flag, logprob in zip(training_sample.loss_mask, training_sample.sampling_logprobs, strict=True)
            )
    for episode in whole:
        assert [m["role"] for m in episode.responses] == ["assistant", "user", "assistant", "user", "assistant"]


def test_turn_continues_from_exactly_the_sampled_tokens(base: str, tokenizer: Any) -> None:
    from rlhf_lightning.data.prompts import Prompt
    from rlhf_lightning.data.rendering import Renderer
    from rlhf_lightning.generation.token_sampling import SamplingParams
    from rlhf_lightning.rollout.runner import EpisodeRunner
    from rlhf_lightning.types import Completion

    renderer = Renderer(tokenizer)

    class Scripted:
        """Samples a fixed text, in tokens that the tokenizer would not produce from it."""

        context, params, stop, session = None, SamplingParams(8), (), staticmethod(nullcontext)
        engine = property(lambda self: self)

        def generate(self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]) -> list[Completion]:
            self.prompts = prompts
            letters = [token for letter in "one" for token in tokenizer(letter)["input_ids"]]
            return [Completion([*letters, tokenizer.eos_token_id], [-1.0] * 4, "stop") for _ in prompts]

    sampler: Any = Scripted()
    (episode,) = EpisodeRunner(sampler, renderer, (0,), Guess).run([(Prompt([], [], {"prompt": "Hi"}), 0)])
    (training_sample,) = episode.training_samples
    assert len(tokenizer("one")["input_ids"]) < 3
    assert sum(training_sample.loss_mask) == 12
    said = [{"role": "user", "content": "Hi"}, *episode.responses]
    assert tokenizer.decode(training_sample.ids) == renderer.template.render(said).rstrip("\n")


def test_recorded_episodes(base: str, tokenizer: Any, tmp_path: Path) -> None:
    source_module = make("policy", base)
    trainer(tmp_path / "a").fit(source_module, data("policy", 4))
    rows = []
    for episode in source_module.last_episodes:
        (training_sample,) = episode.training_samples
        cut = training_sample.loss_mask.index(1)
        rows.append(
            {
                "prompt_tokens": training_sample.ids[:cut],
                "response_tokens": training_sample.ids[cut:],
                "logprobs": training_sample.sampling_logprobs[cut:],
                "reward": episode.reward,
                "group": episode.group,
            }
        )
    path = write_rows(tmp_path / "episodes.jsonl", rows)
    module = make("policy", base, rewards=[])
    trainer(tmp_path / "b").fit(module, PromptDataModule(episodes=path, prompts_per_round=4))
    same(weights(source_module), weights(module), rtol=1e-5, atol=1e-6)

    given = [{**row, "advantage": 1.0} for row in rows]
    module = make("policy", base, rewards=[])
    trainer(tmp_path / "c").fit(module, PromptDataModule(episodes=given, prompts_per_round=8))
    assert all(episode.advantage == 1.0 for episode in module.last_episodes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": None}, "no 'logprobs'"),
        ({"logprobs": [0.5] * 3}, "none above 0"),
        ({"logprobs": [-1.0, -float("inf"), -1.0]}, "must be finite log-probabilities"),
        ({"tokens": [5, 6, 7], "loss_mask": [0, 0.5, 1]}, "'loss_mask' contains 0.5; it must be 1 for sampled tokens"),
        ({"logprobs": [-1.0]}, "'logprobs' has 1 entries; it must have one per sampled token"),
        ({"response_tokens": [10**6] * 3}, "token 1000000 is not in the vocabulary"),
        ({"reward": None}, "no 'reward'"),
        ({"reward": "high"}, "'reward' is 'high'"),
        ({"reward": float("inf")}, "'reward' is inf; it must be a finite number"),
        ({"reward": 10**400}, "'reward' is 1000.*; it must be a finite number"),
        ({"advantage": -1e39}, r"'advantage' is -1e\+39; it must be a finite number"),
    ],
)
def test_malformed_episodes(change: dict[str, Any], message: str, base: str, tmp_path: Path) -> None:
    row = {"prompt_tokens": [5, 6], "response_tokens": [7, 8, 9], "logprobs": [-1.0] * 3, "reward": 1.0, "group": 0}
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(make("policy", base, rewards=[]), PromptDataModule(episodes=[{**row, **change}]))


def test_group_of_episodes_with_different_prompts_is_refused(base: str, tmp_path: Path) -> None:
    row = {"prompt_tokens": [5, 6], "response_tokens": [7, 8, 9], "logprobs": [-1.0] * 3, "reward": 1.0, "group": 0}
    rows = [row, {**row, "reward": 0.0}, {**row, "prompt_tokens": [5, 7]}]
    with pytest.raises(UserError, match=r"list\[2\]: the group '0' is also that of list\[0\], which has another pr"):
        trainer(tmp_path).fit(make("policy", base, rewards=[]), PromptDataModule(episodes=rows))


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        ({}, {"group_size": 1}, "group_size is 1"),
        ({"rewards": []}, {}, "there is no reward"),
        ({"sampler": Sampler(temperature=0.0)}, {}, "temperature is 0"),
        ({"sampler": Sampler(max_tokens=250)}, {}, "exceeds the model's 256 positions"),
        ({"rewards": [FunctionReward(vowels), FunctionReward(vowels)]}, {}, "same name"),
    ],
)
def test_incompatible_policy_settings_are_rejected(
    options: dict[str, Any], source: dict[str, Any], message: str, base: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(make("policy", base, **options), data("policy", 4, **source))


def wrong_count(completions: list[str]) -> list[float]:
    return [1.0]


def nan(completions: list[str]) -> list[float]:
    return [float("nan")] * len(completions)


def words(completions: list[str]) -> list[Any]:
    return ["good"] * len(completions)


def unknown_column(completions: list[str], answer: list[str]) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_count, "returned 1 numbers for"),
        (nan, "returned nan"),
        (words, "returned 'good'"),
        (unknown_column, "argument 'answer'"),
    ],
)
def test_invalid_rewards_are_rejected(function: Any, message: str, base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(make("policy", base, rewards=[FunctionReward(function)]), data("policy", 4))


def test_kl_settings_are_checked() -> None:
    for options, message in (
        ({"estimator": "k1"}, "expected on-policy gradient of k1 is zero"),
        ({"place": "data"}, "place is"),
        ({"coefficient": -1.0}, "not negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            KLPenalty(**options)


def test_optimizer_step_must_not_span_rounds(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not span two rounds"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(make("policy", base), data("policy", 4, minibatches=3))


def test_checkpoint_of_another_stage_is_rejected(base: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(make("sft", base), data("sft"))
    run.save_checkpoint(tmp_path / "sft.ckpt")
    with pytest.raises(ConfigError, match="does not match this stage"):
        trainer(tmp_path).fit(make("preference", base), data("preference"), ckpt_path=str(tmp_path / "sft.ckpt"))


def test_module_with_a_model_object_saves_its_trained_weights(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = make("sft", build_model(tokenizer), tokenizer)
    trainer(tmp_path, callbacks=[ExportModel()]).fit(module, data("sft"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, module.model.eval()(ids).logits)
    assert loaded.generation_config.eos_token_id == [tokenizer.eos_token_id]
