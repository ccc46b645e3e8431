"""Files of settings that no parser or reader should take: refused in one line, in no time."""

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
    "half a character": 'data: {train: "\\ud800"}',
    "no text": b"\xff\xfe\x00",
}
COMMANDS: dict[str, Any] = {
    "fit": lambda path: ["sft", "fit", "-c", path],
    "pipeline": lambda path: ["pipeline", path],
    "report": lambda path: ["report", path.parent],
}


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("what", list(BAD))
def test_a_file_of_settings(what: str, command: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text := BAD[what], bytes) else text.encode())
    begun = time.monotonic()
    result: Result = rlhf(*COMMANDS[command](path))
    refused(result, "config.yaml")
    assert time.monotonic() - begun < 20


def test_what_aliases_are_for_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("one: &one {lr: 0.1}\ntwo: {<<: *one, steps: 3}\n")
    assert read_mapping(tmp_path / "a.yaml")["two"] == {"lr": 0.1, "steps": 3}


def test_bytes_that_no_config_can_hold(tmp_path: Path) -> None:
    refused(rlhf("sft", "fit", "--data.train", tmp_path / os.fsdecode(b"\xff.jsonl")), "not UTF-8")


def test_json_has_the_same_limits(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 10**5)
    with pytest.raises(ConfigError, match=r"a\.json: not valid JSON"):
        read_mapping(tmp_path / "a.json")


def test_a_call_with_deep_arguments_is_malformed() -> None:
    with pytest.raises(ValueError, match="the arguments are not valid JSON"):
        read_call('{"name": "add", "arguments": "' + "[" * 10**5 + '"}')


def test_template_kwargs_that_are_too_deep() -> None:
    refused(rlhf("chat", "nowhere", "--template_kwargs", "[" * 10**4), "--template_kwargs")
