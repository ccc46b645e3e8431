"""Damaged, truncated and malicious GGUF files are refused quickly, with a one-line error and little memory."""

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.gguf.header import read_header
from tests.helpers.cli import mistake
from tests.helpers.gguf import header, text, write_gguf
from tests.helpers.models import build_model

SIZES = {0: (1, 4), 2: (32, 18)}
U32, STRING, ARRAY = struct.pack("<I", 4), struct.pack("<I", 8), struct.pack("<I", 9)
HUGE = struct.pack("<Q", 2**60)


def key(name: str, value: bytes) -> bytes:
    return text(name) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return text(name) + packed


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "another magic": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "a login page": (b"<!DOCTYPE html>" + bytes(100), "another kind of file, or its download is incomplete"),
    "only the magic": (b"GGUF", "ends within its header"),
    "version 1": (header(version=1), "has version 1; 2 and 3 are supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "2^60 tensors": (header(tensors=2**60), f"{2**60} tensors, too many for a file of 24 bytes"),
    "2^60 keys": (header(keys=2**60), f"declares {2**60} keys"),
    "too many tensors in a large file": (header(tensors=200_000) + bytes(32 * 200_000), "declares 200000 tensors"),
    "a key of 2^60 bytes": (header(keys=1) + HUGE + bytes(40), "ends within its header"),
    "a text of 2^60 bytes": (header(keys=1) + key("a", STRING + HUGE + bytes(40)), "ends within its header"),
    "a list of 2^60": (header(keys=1) + key("a", ARRAY + U32 + HUGE + bytes(40)), f"{2**60} values in a list"),
    "2^60 texts": (header(keys=1) + key("a", ARRAY + STRING + HUGE + bytes(40)), f"{2**60} values in a list"),
    "lists of lists": (header(keys=1) + key("a", (ARRAY + struct.pack("<I", 9)) * 20), "a list of values of type 9"),
    "an unknown type": (header(keys=1) + key("a", struct.pack("<I", 77)) + bytes(8), "a value of the unknown type 77"),
    "not UTF-8": (header(keys=1) + text(b"\xff\xfe") + U32 + bytes(9), "is not valid UTF-8"),
    "a key twice": (header(keys=2) + key("a", U32 + U32) * 2, "the metadata key 'a' appears twice"),
    "alignment 0": (header(keys=1) + key("general.alignment", U32 + bytes(4)), "general.alignment is 0"),
    "alignment 3": (header(keys=1) + key("general.alignment", U32 + b"\3\0\0\0"), "general.alignment is 3"),
    "alignment of text": (header(keys=1) + key("general.alignment", STRING + text("32")), "general.alignment is '32'"),
    "no dimension": (header(1) + tensor("a", ()) + bytes(64), "has 0 dimensions"),
    "a billion dimensions": (header(1) + text("a") + struct.pack("<I", 10**9) + bytes(64), "has 1000000000 dimensions"),
    "a huge tensor": (header(1) + tensor("a", (2**60, 2**60)) + bytes(64), "its download is incomplete"),
    "an empty tensor": (header(1) + tensor("a", (0, 4)) + bytes(64), "which its type does not allow"),
    "half a block": (header(1) + tensor("a", (16, 4), kind=2) + bytes(64), "which its type does not allow"),
    "an unknown type of weights": (header(1) + tensor("a", (4,), kind=99) + bytes(64), "the unknown ggml type 99"),
    "a tensor beyond the end": (header(1) + tensor("a", (4,), offset=2**60) + bytes(64), "its download is incomplete"),
    "a tensor twice": (header(2) + tensor("a", (1,)) * 2 + bytes(64), "the tensor 'a' appears twice"),
    "overlapping tensors": (
        header(2) + tensor("a", (4,)) + tensor("b", (4,), offset=8) + bytes(128),
        "overlaps another tensor",
    ),
    "a name with escapes": (header(2) + tensor("\x1b[2J", (1,)) * 2 + bytes(64), r"the tensor '\x1b[2J' appears twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_header_gives_a_one_line_error(name: str, tmp_path: Path) -> None:
    content, expected = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ConfigError) as error:
        read_header(path, SIZES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert time.perf_counter() - started < 2
    assert peak < 1_000_000


def test_every_truncation_is_refused(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    whole = write_gguf(tmp_path / "whole.gguf", build_model(tokenizer, architecture="llama"), tokenizer, "llama")
    content = whole.read_bytes()
    length = len(content)
    for part in (*range(0, 400, 7), *range(400, length, length // 40), length - 64):
        (tmp_path / "part.gguf").write_bytes(content[:part])
        with pytest.raises(ConfigError, match=r"GGUF file .*part\.gguf"):
            model_folder(str(tmp_path / "part.gguf"))


def test_flipped_bytes_give_a_model_or_a_one_line_error(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If any byte of the header is wrong, the result is a folder or a `ConfigError`, never another exception."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("safetensors.torch.save_file", lambda weights, path, **_: Path(path).write_bytes(b""))
    whole = write_gguf(tmp_path / "whole.gguf", build_model(tokenizer, architecture="qwen3"), tokenizer, "qwen3")
    content = whole.read_bytes()
    vocabulary = content.index(b"tokenizer.ggml.tokens")
    end = content.index(b"tokenizer.ggml.merges") + 600
    refused = []
    for place in (*range(4, vocabulary + 60, 5), *range(end - 700, end, 9)):
        for value in (content[place] ^ 0x80, content[place] ^ 1):
            path = tmp_path / f"{place}-{value}.gguf"
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                model_folder(str(path))
            except ConfigError as error:
                refused.append(str(error))
            path.unlink()
    assert len(refused) > 100
    assert not [message for message in refused if "\n" in message]


def bad_model(**options: Any) -> Callable[[Path, Any], Path]:
    def write(path: Path, tokenizer: Any) -> Path:
        model = build_model(tokenizer, architecture=options.get("architecture", "llama"))
        given = {key: value for key, value in options.items() if key != "architecture"}
        return write_gguf(path, model, tokenizer, given.pop("kind", "llama"), **given)

    return write


MODELS: dict[str, tuple[Callable[[Path, Any], Path], str]] = {
    "another architecture": (
        bad_model(extra={"general.architecture": "clip"}),
        "its architecture is clip; supported are",
    ),
    "experts": (bad_model(extra={"llama.expert_count": 8}), "it is a mixture of experts"),
    "a part": (bad_model(extra={"split.count": 3}), "is one of 3 parts"),
    "a billion layers": (bad_model(extra={"llama.block_count": 10**9}), "llama.block_count is 1000000000; it must"),
    "a million layers": (
        bad_model(extra={"llama.block_count": 10**6}),
        "is 1000000, but the file has the weights of 2",
    ),
    "no layers": (bad_model(extra={"llama.block_count": 0}), "llama.block_count is 0"),
    "a layer less": (
        bad_model(extra={"llama.block_count": 1}),
        "llama.block_count is 1, but the file has the weights of 2",
    ),
    "a text for a number": (bad_model(extra={"llama.block_count": "2"}), "it must be a whole number"),
    "huge heads": (bad_model(extra={"llama.attention.head_count": 2**31 - 1}), "it must be from 1 to"),
    "wrong heads": (
        bad_model(extra={"llama.attention.head_count": 2**20}),
        "not a multiple of the number of attention",
    ),
    "odd heads": (bad_model(extra={"llama.attention.head_count": 3}, without=("llama.attention.key_length",)), "divis"),
    "huge width": (bad_model(extra={"llama.embedding_length": 2**31 - 1}), "it must be from 1 to"),
    "wrong width": (bad_model(extra={"llama.embedding_length": 2**20}), "has the shape"),
    "no width": (bad_model(without=("llama.embedding_length",)), "llama.embedding_length is None"),
    "a missing weight": (bad_model(without=("blk.1.ffn_up.weight",)), "lacks 1 of the model's weights"),
    "no embedding": (bad_model(without=("token_embd.weight",)), "has no embedding (token_embd.weight)"),
    "no vocabulary": (bad_model(without=("tokenizer.ggml.tokens",)), "has no vocabulary"),
    "more tokens than rows": (bad_model(extra={"tokenizer.ggml.tokens": ["a"] * 9999}), "but its embedding has only"),
    "repeated tokens": (bad_model(extra={"tokenizer.ggml.tokens": ["a", "a"]}), "its vocabulary has repeated tokens"),
    "an unknown tokenizer": (bad_model(extra={"tokenizer.ggml.model": "rwkv"}), "tokenizer.ggml.model is 'rwkv'"),
    "an unknown pre-tokenizer": (bad_model(pre="../../etc/passwd"), "is '../../etc/passwd'; supported are"),
    "no pre-tokenizer": (bad_model(without=("tokenizer.ggml.pre",)), "(tokenizer.ggml.pre) is None; supported are"),
    "merges of nothing": (bad_model(extra={"tokenizer.ggml.merges": ["zzz yyy"]}), "is not in its vocabulary"),
    "no merges": (bad_model(without=("tokenizer.ggml.merges",)), "has no merges"),
    "a stop token outside": (bad_model(extra={"tokenizer.ggml.eos_token_id": 10**6}), "eos_token_id is 1000000, but"),
    "an eot outside": (bad_model(extra={"tokenizer.ggml.eot_token_id": 10**6}), "its end-of-sequence token 1000000"),
    "a template that is a number": (bad_model(extra={"tokenizer.chat_template": 7}), "chat_template is 7; it must be"),
    "an unknown scaling": (
        bad_model(extra={"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
        "rope.scaling.type is 'longrope'",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_model_gives_a_one_line_error(
    name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints one line, and leaves no files in the cache."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    write, expected = MODELS[name]
    path = write(tmp_path / "bad model.gguf", tokenizer)
    error = mistake(["generate", str(path), "--prompt", "x"], capsys)
    assert expected in error
    assert error.count("\n") == 1, error
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file() and not one.name.endswith(".lock")]


def test_pipes_devices_and_links(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "none")
    for name, expected in (("pipe.gguf", "a named pipe"), ("nowhere.gguf", "no such file")):
        with pytest.raises(ConfigError, match=expected):
            model_folder(str(tmp_path / name))
    with pytest.raises(ConfigError, match="a device; it must be a file"):
        read_header(Path("/dev/zero"), SIZES)


def test_code_in_a_chat_template_is_not_run(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    mark = tmp_path / "mark"
    code = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    source = bad_model(extra={"tokenizer.chat_template": code})(tmp_path / "bad.gguf", tokenizer)
    mistake(["generate", str(source), "--prompt", "x"], capsys)
    assert not mark.exists()
