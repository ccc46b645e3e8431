"""The tokenizer of a file gives the same ids as the one that it was written from."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rlhf_lightning.gguf.header import Header, Tensor
from rlhf_lightning.gguf.tokenizer import tokenizer_of
from tests.helpers.gguf import vocabulary

ODD = [
    "",
    " ",
    "  two  spaces ",
    "é日本🙂\u200b",
    "a\tb\r\n\n c",
    "3.14 and 1000000\n\n1. It's I'LL",
    "x" * 300,
    "\x00",
]


def header(metadata: dict[str, Any], kind: str = "llama") -> Header:
    rows = len(metadata["tokenizer.ggml.tokens"])
    embedding = Tensor("token_embd.weight", (rows, 8), 0, 0, 0)
    return Header(Path("own.gguf"), {"general.architecture": kind, **metadata}, {embedding.name: embedding}, 0)


def texts(shared: Path) -> list[str]:
    files = sorted((shared / "data").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    turns = [turn for row in rows[::4] for turn in row.get("messages") or [*row["prompt"], *row["chosen"]]]
    return [*ODD, *(str(turn.get("content") or "") for turn in turns)]


@pytest.mark.parametrize(("name", "pre"), [("smollm2-135m-instruct", "smollm"), ("qwen3", "qwen2")])
def test_real_tokenizers(name: str, pre: str, shared: Path) -> None:
    folder = shared / "tokenizers" / name
    theirs = AutoTokenizer.from_pretrained(folder)
    metadata = vocabulary(theirs, len(theirs) + 9) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.eos_token_id": theirs.eos_token_id,
        "tokenizer.chat_template": theirs.chat_template,
    }
    ours = tokenizer_of(header(metadata))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    if name == "smollm2-135m-instruct":  # transformers reads it as GPT-2's, without the split of digits
        stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected = [one.ids for one in stored.encode_batch(texts(shared))]
    else:
        expected = theirs(texts(shared))["input_ids"]
    assert ours(texts(shared))["input_ids"] == expected
    assert ours.batch_decode(expected[:200]) == theirs.batch_decode(expected[:200])


def sentencepiece(**more: Any) -> dict[str, Any]:
    """A vocabulary as llama.cpp writes it for sentencepiece."""
    pieces = ["▁", "a", "b", "c", "▁a", "bc", "▁abc", "ab", "<turn>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 1), 4],
        "tokenizer.ggml.scores": [0.0] * 259 + [-1e9] * 4 + [-1.0, -2.0, -3.0, -4.0, 0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("abc", {}, ["<s>", "▁abc"]),
        ("cab abc", {}, ["<s>", "▁", "c", "ab", "▁abc"]),
        ("abc", {"tokenizer.ggml.add_space_prefix": False}, ["<s>", "a", "bc"]),
        ("ab", {"tokenizer.ggml.add_bos_token": False}, ["▁a", "b"]),
        ("ab", {"tokenizer.ggml.add_eos_token": True}, ["<s>", "▁a", "b", "</s>"]),
        ("é", {}, ["<s>", "▁", "<0xC3>", "<0xA9>"]),
        ("<turn>a", {"tokenizer.ggml.add_space_prefix": False}, ["<s>", "<turn>", "a"]),
    ],
)
def test_sentencepiece(text: str, more: dict[str, Any], expected: list[str]) -> None:
    """Pairs are merged by score, `bc` (-2) before `ab` (-4), and unknown characters become bytes."""
    tokenizer = tokenizer_of(header(sentencepiece(**more)))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    if "turn" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_gemma_tokenizes_runs_of_spaces() -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"][-1] = "  "
    tokenizer = tokenizer_of(header(metadata, "gemma"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  b")["input_ids"]) == ["<s>", "a", "▁▁", "b"]
    assert tokenizer.decode(tokenizer("a  b")["input_ids"], skip_special_tokens=True) == "a  b"
