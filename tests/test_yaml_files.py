"""Settings files that cannot or must not be parsed are refused quickly, with a one-line error."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.environments.tools import read_call
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.yaml_files import read_mapping
from tests.helpers.fuzzing import Result, refused, rlhf

ALIASES = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "deep": "data: " + "[" * 10**5,
    "deep object": '{"data": ' * 3000 + "1" + "}" * 3000,
    "no date": "data: 2026-13-45",
    "aliases": ALIASES,
    "an alias of itself": "data: &a [*a]",
    "null character": 'data: {train: "a\\0b"}',
    "unpaired surrogate": 'data: {train: "\\ud800"}',
    "no text": b"\xff\xfe\x00",
}
COMMANDS: dict[str, Any] = {
    "fit": lambda path: ["sft", "fit", "-c", path],
    "pipeline": lambda path: ["pipeline", path],
    "report": lambda path: ["report", path.parent],
}


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("what", list(BAD))
def test_bad_settings_file_is_refused_quickly(what: str, command: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text := BAD[what], bytes) else text.encode())
    begun = time.monotonic()
    result: Result = rlhf(*COMMANDS[command](path))
    refused(result, "config.yaml")
    assert time.monotonic() - begun < 20


def test_yaml_aliases_and_merge_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("one: &one {lr: 0.1}\ntwo: {<<: *one, steps: 3}\n")
    assert read_mapping(tmp_path / "a.yaml")["two"] == {"lr": 0.1, "steps": 3}


def test_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    refused(rlhf("sft", "fit", "--data.train", tmp_path / os.fsdecode(b"\xff.jsonl")), "not valid UTF-8")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 10**5)
    with pytest.raises(ConfigError, match=r"a\.json: not valid JSON"):
        read_mapping(tmp_path / "a.json")


def test_deeply_nested_tool_call_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="the arguments are not valid JSON"):
        read_call('{"name": "add", "arguments": "' + "[" * 10**5 + '"}')


def test_deeply_nested_template_kwargs_are_refused() -> None:
    refused(rlhf("chat", "nowhere", "--template_kwargs", "[" * 10**4), "--template_kwargs")
