"""Builds the tokenizer of a GGUF file from its vocabulary, merges and the name of its pre-tokenizer."""

import re
from typing import TYPE_CHECKING

from rlhf_lightning.gguf.header import Header

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
"""Kinds of tokens in `tokenizer.ggml.token_type`."""
_FILLER = re.compile(r"\[PAD\d+\]")
"""Tokens with which llama.cpp's conversion pads the vocabulary to the number of embedding rows."""

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
"""Regular expressions that split text before byte-pair encoding, by llama.cpp's name of the pre-tokenizer."""
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Pre-tokenizers that split off each digit, and split the rest as GPT-2 does."""
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "trillion", "granite-docling")
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Pre-tokenizers with `ignore_merges`: a word that is in the vocabulary becomes one token, whatever the merges."""

_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(header: Header) -> "PreTrainedTokenizerBase":
    """Build the tokenizer of a file, with its chat template.

    Args:
        header: The file's header.

    Raises:
        ConfigError: If the file has no tokenizer, or one of an unsupported kind.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = header.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise header.refuse(
            "it has no vocabulary (tokenizer.ggml.tokens). Use the folder or Hub id of the model instead"
        )
    rows = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0
    if len(tokens) > rows:
        raise header.refuse(f"its vocabulary has {len(tokens)} tokens, but its embedding has only {rows} rows")
    kinds = header.wholes("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise header.refuse("its vocabulary has repeated tokens, or the numbers of tokens and of token types differ")
    while kinds and kinds[-1] == _UNUSED and _FILLER.fullmatch(tokens[len(kinds) - 1]):
        kinds.pop()
    tokens = tokens[: len(kinds)]
    model = header.text("tokenizer.ggml.model")
    if model == "gpt2":
        backend = _byte_level(header, tokens, kinds)
    elif model == "llama":
        backend = _sentencepiece(header, tokens, kinds)
    else:
        raise header.refuse(f"tokenizer.ggml.model is {model!r}; supported are gpt2 and llama")
    _add_tokens(backend, tokens, kinds)
    named = {name: _token(header, tokens, key) for name, key in _NAMES.items()}
    _add_ends(backend, header, tokens, model == "llama")
    given = {name: token for name, token in named.items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=header.whole(f"{header.text('general.architecture')}.context_length") or 2048,
        **given,
    )
    tokenizer.chat_template = header.text("tokenizer.chat_template")
    return tokenizer


def stop_ids(header: Header) -> list[int]:
    """Ids of the tokens that end a response.

    Args:
        header: The file's header.
    """
    ids = {header.whole(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    return sorted({one for one in ids if one is not None} | set(header.wholes("tokenizer.ggml.eos_token_ids")))


def _token(header: Header, tokens: list[str], name: str) -> str | None:
    number = header.whole(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if number >= len(tokens):
        raise header.refuse(
            f"tokenizer.ggml.{name}_token_id is {number}, but the vocabulary has only {len(tokens)} tokens"
        )
    return tokens[number]


def _byte_level(header: Header, tokens: list[str], kinds: list[int]) -> "Tokenizer":
    """Byte-level byte-pair encoding, as in GPT-2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = header.text("tokenizer.ggml.pre")
    if name is None and str(header.text("general.architecture")).startswith("qwen"):
        name = "qwen2"  # older files lack the name
    pairs = [merge.split(" ") for merge in header.texts("tokenizer.ggml.merges")]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise header.refuse("it has no merges (tokenizer.ggml.merges), or merges that are not pairs of tokens")
    merges = [(left, right) for left, right in pairs]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if missing := [one for pair in merges for one in (*pair, "".join(pair)) if one not in vocabulary]:
        raise header.refuse(f"its merges contain {missing[0]!r:.60}, which is not in its vocabulary")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _WHOLE_WORDS))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in _SPLITS:
        splits = [pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated"), plain]
    elif name in _DIGITS:
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif name in _GPT2:
        splits = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        known = ", ".join(sorted({*_SPLITS, *_DIGITS, *_GPT2}))
        raise header.refuse(f"its pre-tokenizer (tokenizer.ggml.pre) is {name!r}; supported are {known}")
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    if _SPLITS.get(name) == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: Header, tokens: list[str], kinds: list[int]) -> "Tokenizer":
    """Byte-pair encoding of characters, with bytes for unknown characters, as in sentencepiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    gemma = str(header.text("general.architecture")).startswith("gemma")
    if gemma:  # the vocabulary stores runs of spaces as spaces
        tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in tokens]
    scores = header.numbers("tokenizer.ggml.scores")
    if len(scores) < len(tokens):
        raise header.refuse(f"it has {len(scores)} scores (tokenizer.ggml.scores) for {len(tokens)} tokens")
    # Gemma merges in the order of the vocabulary.
    ranks = {token: number if gemma else -scores[number] for number, token in enumerate(tokens)}
    merges = _merges(tokens, kinds, ranks)
    unknown = _token(header, tokens, "unknown") or next(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = not gemma and header.flag("tokenizer.ggml.add_space_prefix") is not False
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if gemma:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return backend


def _merges(tokens: list[str], kinds: list[int], ranks: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that produce each token, best first; sentencepiece itself stores only the tokens."""
    found = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _UNKNOWN) or len(token) > 256:
            continue
        pairs = [(token[:place], token[place:]) for place in range(1, len(token))]
        inside = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        inside.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        found += [(ranks[token], pair) for pair in inside]
    found.sort(key=lambda one: one[0])
    return [pair for _, pair in found]


def _add_tokens(backend: "Tokenizer", tokens: list[str], kinds: list[int]) -> None:
    """Add the tokens that are never split."""
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        chosen = [token for token, own in zip(tokens, kinds, strict=True) if own == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in chosen if _kept(backend, token)]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _kept(backend: "Tokenizer", token: str) -> bool:
    return bool(token) and backend.token_to_id(token) is not None


def _add_ends(backend: "Tokenizer", header: Header, tokens: list[str], sentencepiece: bool) -> None:
    """Add the post-processor that puts special tokens at the beginning and end of a text."""
    from tokenizers import processors

    begins = header.flag("tokenizer.ggml.add_bos_token")
    begins = sentencepiece if begins is None else begins  # llama.cpp's defaults
    first = _token(header, tokens, "bos") if begins else None
    last = _token(header, tokens, "eos") if header.flag("tokenizer.ggml.add_eos_token") else None
    if first is None and last is None:
        return
    around = [*([first] if first else []), "$A", *([last] if last else [])]
    second = [*([f"{first}:1"] if first else []), "$B:1", *([f"{last}:1"] if last else [])]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((first, last)) if token]
    backend.post_processor = processors.TemplateProcessing(single=around, pair=[*around, *second], special_tokens=ids)
