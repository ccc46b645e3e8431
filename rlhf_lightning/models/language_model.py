"""A causal language model outside training, with its own tokenizer and chat template."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rlhf_lightning.data.rendering_settings import RenderingSettings
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.heads import task_of
from rlhf_lightning.models.loading import check_source, check_vocabulary, disable_dropout, load_for_scoring
from rlhf_lightning.models.precision import sparing
from rlhf_lightning.types import JSON


class LanguageModel(nn.Module):
    """A causal language model, frozen, with its own tokenizer and chat template.

    Args:
        source: Model folder, Hub id or GGUF file.
        dtype: Data type of its weights.
        asked: Rendering settings that replace those of its training, see
            `data.rendering_settings.RenderingSettings`.

    Attributes:
        folder: Folder or Hub id; for a GGUF file, the folder that it was converted to.
        model: The model.
        tokenizer: The tokenizer.
        asking: The rendering settings.
        renderer: The renderer, with the ids and texts that end a response.

    Raises:
        ConfigError: If the source is a reward model or cannot be loaded.

    Example:
        >>> loaded = LanguageModel("runs/sft/model")  # doctest: +SKIP
        >>> sampler = Sampler(temperature=0.0).build(loaded.model, loaded.renderer)  # doctest: +SKIP
    """

    def __init__(self, source: str, dtype: str = "float32", asked: Mapping[str, JSON] | None = None) -> None:
        super().__init__()
        self.folder = check_source(source)
        if task_of(self.folder) == "SEQ_CLS":
            raise ConfigError(f"{source} is a reward model and cannot generate text; give a causal language model")
        self.tokenizer = load_tokenizer(self.folder)
        self.asking = RenderingSettings.of(source, **(asked or {}))
        self.renderer = self.asking.renderer(self.tokenizer, end_token_ids(self.folder, self.tokenizer))
        self.model = load_for_scoring(self.folder, "CAUSAL_LM", dtype)
        check_vocabulary(self.model, self.tokenizer, f"the model {source}")
        disable_dropout(self.model)
        self.model.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModel":
        # Keep the requested dtype even if the policy's module is cast.
        return super()._apply(sparing(fn, lambda tensor: True), recurse)
