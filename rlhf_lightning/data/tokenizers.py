"""Loading tokenizers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.data.ended_templates import unwrapped
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import check_path, is_file
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.types import JSON, LoadedTokenizer, ModelSource, Tokenizer
from rlhf_lightning.untrusted import check_files, load_failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISSING = (
    "no tokenizer can be loaded from {}: files are missing (tokenizer.json, tokenizer_config.json and others). "
    "Copy them from the model that this one was trained from, or set model.tokenizer."
)


def load_tokenizer(
    source: ModelSource,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    chat_template: str | None = None,
    **options: JSON,
) -> LoadedTokenizer:
    """Load a tokenizer.

    Args:
        source: The model: its folder, Hub id or object.
        tokenizer: The tokenizer, its folder or Hub id; by default the model's.
        chat_template: A chat template that replaces the tokenizer's: a file, or its text.
        **options: Arguments of `from_pretrained`.

    Raises:
        ConfigError: If the tokenizer or the template file cannot be loaded.
    """
    loaded: PreTrainedTokenizerBase = tokenizer
    if tokenizer is None or isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        name = tokenizer or getattr(source, "name_or_path", None) or source
        if not isinstance(name, str | Path) or not str(name):
            raise ConfigError("a model object has no tokenizer; pass it with tokenizer=")
        try:
            # Set explicitly; otherwise transformers asks at the terminal.
            loaded = AutoTokenizer.from_pretrained(_checked(name, options), **{"trust_remote_code": False, **options})
        except UserError:
            raise
        except BaseException as error:
            # A broken tokenizer.json raises a plain `Exception`, or a panic of the library, which is a BaseException.
            if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
                raise
            reason = load_failure(error)
            if reason.startswith("Couldn't instantiate the backend tokenizer"):
                raise ConfigError(_MISSING.format(name)) from error
            raise ConfigError(f"no tokenizer can be loaded from {name}: {reason}. Set model.tokenizer.") from error
        longest = getattr(loaded, "model_max_length", 0)
        if isinstance(longest, bool) or not isinstance(longest, int | float):
            raise ConfigError(
                f"{name}: model_max_length of tokenizer_config.json is {longest!r:.80}; it must be a number of tokens"
            )
        # If files are missing, transformers makes a tokenizer of special tokens only, for which every text is empty.
        if len(loaded) <= len(getattr(loaded, "added_tokens_decoder", ())):
            raise ConfigError(_MISSING.format(name))
    if not hasattr(loaded, "apply_chat_template"):
        raise ConfigError(f"tokenizer is {loaded!r}; it must be a folder, a Hub id, or a tokenizer of transformers")
    if chat_template is not None:
        loaded.chat_template = _template(chat_template)
    if isinstance(loaded.chat_template, str):  # an editor may have saved chat_template.jinja with a byte order mark
        loaded.chat_template = loaded.chat_template.removeprefix("\ufeff")
    before, loaded.chat_template = loaded.chat_template, unwrapped(loaded.chat_template)
    # `RewardModel` uses this to read the score at the end of the turn or at the end of the template.
    loaded.was_ended = getattr(loaded, "was_ended", False) or loaded.chat_template != before
    return loaded


def _checked(name: str | Path, options: Mapping[str, JSON]) -> str:
    """A tokenizer source as text; raises `ConfigError` for a path that does not exist."""
    name = model_folder(str(name), options)
    path = check_path(f"tokenizer {name!r}", name)
    source = str(path) if path.exists() else name
    check_files(source, options)
    return source


def _template(value: str) -> str:
    """Read a chat template from a file, or return a text that is a template."""
    if "{" in value:
        return value
    path = Path(value)
    if not is_file(path):
        raise ConfigError(
            f"model.chat_template {value!r}: this is neither a file nor a template (a template contains braces)"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"model.chat_template {value!r} is not UTF-8 text ({error}); save it as UTF-8") from None
    if not text.strip():
        raise ConfigError(f"model.chat_template {value!r} is empty; give a file with a template")
    return text


def conflicting_tokens(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    """Tokens of `ours` that have another id in `theirs`, or whose id is another token there, by their id.

    Tokens that only one tokenizer has are no conflict: an embedding may be padded, or resized for added tokens.
    """
    own, other = ours.get_vocab(), theirs.get_vocab()
    by_id = {number: token for token, number in other.items()}
    wrong = [
        token
        for token, number in own.items()
        if by_id.get(number, token) != token or other.get(token, number) != number
    ]
    return sorted(wrong, key=own.__getitem__)


def added_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer adds before and after a text (`add_special_tokens`)."""
    for text in ("a", "1", "."):
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(text)["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []
