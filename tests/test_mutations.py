"""Every setting of the three stages and of a pipeline file, and every flag of every command, with values that do not
fit: each is refused in one line that names it, or runs where the value has a meaning.

Both are taken from the parsers (`tests/helpers/mutations.py`). The fast run takes a seeded sample; the slow run
all of them, and with RLHF_FUZZ_REPORT writes the counts.
"""

import io
import json
import random
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import uvicorn
import yaml

import rlhf_lightning.quickstart.run
from rlhf_lightning.cli.main import COMMANDS
from rlhf_lightning.files import visible
from rlhf_lightning.pipeline.run import _Runner
from tests.helpers.fuzzing import Place, Result, Tally, refused, rlhf, write_report
from tests.helpers.models import build_model
from tests.helpers.mutations import (
    MEANT_FLAGS,
    MEANT_SETTINGS,
    NAMED_OTHERWISE,
    VALUES,
    command_parser,
    laid,
    plan_keys,
    setting_keys,
    stage_parser,
    value_flags,
)
from tests.helpers.rows import chats, pairs, prompts, write_rows

TALLY = Tally()
WARMUP = {"class_path": "rlhf_lightning.modules.schedules.Warmup", "init_args": {"warmup_steps": 1}}
KEYWORDS = {"class_path": "rlhf_lightning.rewards.KeywordReward", "init_args": {"keywords": ["a"]}}
WITHIN: dict[str, dict[str, Any]] = {
    "sft": {"lora": {"rank": 2}, "lr_scheduler": WARMUP},
    "preference": {"scorer": {"class_path": "ImplicitReward"}, "loss": {"class_path": "BradleyTerry"}},
    "policy": {
        "kl": {"coefficient": 0.1},
        "limits": {},
        "critic": {"learning_rate": 0.1},
        "advantage": {"class_path": "GAE"},
        "importance_weights": {},
        "rewards": [KEYWORDS],
        "objective": {"class_path": "rlhf_lightning.objectives.policy.ClippedSurrogate"},
    },
}
"""What has settings of its own, beside what the configs of the other fuzz tests have."""


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    write_report(TALLY)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Place:
    return Place(tmp_path_factory.mktemp("mutations"), session_tokenizer)


@pytest.fixture
def case(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Empty the folder in which a case's command runs."""

    def clear() -> Path:
        folder = place.clear()
        (folder / "a_folder").mkdir()
        monkeypatch.chdir(folder)
        return folder

    yield clear
    monkeypatch.chdir(place.root)


def some(everything: list[tuple[Any, ...]], count: int | None) -> list[tuple[Any, ...]]:
    """All cases, or a number of them, the same ones in every run."""
    return everything if count is None else random.Random(0).sample(everything, count)


def of_counts(fast: int) -> Any:
    """A test of a number of cases, or of all in the slow run."""
    marks = [pytest.mark.slow, pytest.mark.timeout(5400)]
    return pytest.mark.parametrize("count", [fast, pytest.param(None, marks=marks)])


def judge(kind: str, name: str, value: str, result: Result, names: list[str], meant: bool) -> str | None:
    """Count a case; returns what is wrong with its outcome, or None."""
    if result.code == 0:
        if not meant:
            return f"{name} {value}: went through"
        TALLY.add("setting" if kind in (*WITHIN, "pipeline file") else "flag", f"{kind} runs", (name, value))
        return None
    if result.code == 1 and name.startswith("data check") and "bad rows" in result.out:
        TALLY.add("flag", "data lists bad rows", (name, value))
        return None
    try:
        refused(result, *names)
    except AssertionError as error:
        return f"{name} {value}: {str(error)[:300]}"
    TALLY.add("setting" if kind in (*WITHIN, "pipeline file") else "flag", f"{kind} refused", (name, value))
    return None


def reset_torch() -> None:
    """Undo what `trainer.deterministic` and similar settings leave behind in a process."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch._dynamo.reset()


def tried(run: Any, name: str, value: str) -> Result | str:
    """The result of a command, or the exception that it raised."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - each is a finding, all of which are shown
        return f"{name} {value}: {type(error).__name__}: {str(error)[:200]}"


def named(key: str) -> list[str]:
    """Words of which at least one must be in a message about a setting."""
    parts = [part for part in key.split(".") if part != "init_args" and not part.isdigit()]
    return [parts[-1], *NAMED_OTHERWISE.get(key, ())]


# -- settings ---------------------------------------------------------------------------------------------------------


@of_counts(6)
@pytest.mark.parametrize("kind", list(WITHIN))
def test_settings(kind: str, count: int | None, place: Place, case: Any) -> None:
    config = place.config(kind)
    config["model"] |= WITHIN[kind]
    parser = stage_parser(kind)
    keys = [key for key in setting_keys(parser, config) if kind == "sft" or not key.startswith("trainer.")]
    assert len(keys) > 45
    file, wrong = place.root / f"{kind}-mutated.yaml", []
    file.write_text(yaml.safe_dump(config))
    fit = [kind, "fit", "-c", file, "--trainer.default_root_dir"]
    assert rlhf(*fit, case() / "run").code == 0
    for number, (key, value) in enumerate(some([(key, value) for key in keys for value in VALUES], count)):
        settings = laid(config, key.split("."), VALUES[value])
        folder = case()
        reset_torch()
        if count is None and number % 10 and value != "nul" and (message := refused_by_parser(parser, settings)):
            # Nine of ten that the parser refuses are not read from a file: it takes most of the time.
            found: Result | str = Result(2, "", message)
        else:
            file.write_text(yaml.safe_dump(settings))
            args = fit[:-1] if key == "trainer.default_root_dir" else [*fit, folder / "run"]
            found = tried(lambda args=args: rlhf(*args), key, value)
        short = key.removeprefix("model.").replace("init_args.", "")
        by_name = [MEANT_SETTINGS[name] for name in {key, short, key.rpartition(".")[2]} if name in MEANT_SETTINGS]
        meant = any(value in values for values in by_name)
        names = named(key)
        if isinstance(VALUES[value], str) and value != "empty":
            names += [VALUES[value][:90], visible(VALUES[value])]  # a file that is named tells as well what is meant
        if isinstance(found, str) or (found := judge(kind, key, value, found, names, meant)):
            wrong.append(found)
            print(found)  # each as it is found: all of them take a while
    assert not wrong, f"{len(wrong)}\n" + "\n".join(map(str, wrong))


def refused_by_parser(parser: Any, settings: dict[str, Any]) -> str:
    """The parser's message about settings; empty if it accepts them."""
    with redirect_stderr(io.StringIO()) as said:
        try:
            parser.parse_object(deepcopy(settings))
        except SystemExit:
            return said.getvalue()
    return ""


class Started(Exception):
    """The command has checked its input and begins the stages."""


@of_counts(10)
def test_pipeline_files(count: int | None, place: Place, case: Any) -> None:
    (place.root / "sft.yaml").write_text(yaml.safe_dump(place.config("sft")))
    plan = {"name": "test", "seed": 3, "root": "root", "stages": [{"kind": "sft", "config": "sft.yaml"}]}
    file, wrong = place.root / "plan.yaml", []
    for key, value in some([(key, value) for key in plan_keys() for value in VALUES], count):
        file.write_text(yaml.safe_dump(laid(plan, key.split("."), VALUES[value])))
        case()
        with mock.patch.object(_Runner, "run", side_effect=Started):
            found = tried(lambda: rlhf("pipeline", file), key, value)
        meant = value in MEANT_SETTINGS.get(f"plan.{key}", ())
        if isinstance(found, str) and ": Started: " in found:
            found = Result(0, "", "")
        names = [*named(key), VALUES["long"][:90]]
        if isinstance(found, str) or (found := judge("pipeline file", key, value, found, names, meant)):
            wrong.append(found)
            print(found)  # each as it is found: all of them take a while
    assert not wrong, f"{len(wrong)}\n" + "\n".join(map(str, wrong))


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(place: Place, session_tokenizer: Any) -> dict[tuple[str, ...], dict[str, Any]]:
    """Working commands, with their arguments by name."""
    root = place.root
    reward = root / "reward"
    build_model(session_tokenizer, task="SEQ_CLS").save_pretrained(reward)
    session_tokenizer.save_pretrained(reward)
    kinds = {"pairs": pairs, "prompts": prompts, "chats": chats}
    rows = {name: write_rows(root / f"{name}.jsonl", make(3)) for name, make in kinds.items()}
    labeled = write_rows(root / "labeled.jsonl", [{"text": "one", "unsafe": 1}])
    rules = root / "rules.yaml"
    rules.write_text("rules: {five: {terms: [five]}}")
    config, plan = root / "sft-flags.yaml", root / "plan-flags.yaml"
    config.write_text(yaml.safe_dump(place.config("sft")))
    plan.write_text(yaml.safe_dump({"stages": [{"kind": "sft", "config": config.name}]}))
    assert rlhf("sft", "fit", "-c", config, "--trainer.default_root_dir", root / "done").code == 0
    short = {"--max_tokens": "4"}
    judged = {"prompts": rows["prompts"], "--reward": reward, **short}
    return {
        ("generate",): {"model": place.base, "--prompt": "Count", **short},
        ("chat",): {"model": place.base, **short},
        ("label",): {
            "--model": place.base,
            "--prompts": rows["prompts"],
            "--out": "labels.jsonl",
            "--port": "0",
            **short,
        },
        ("serve",): {"model": place.base, "--port": "0", **short},
        ("tinker",): {"model": place.base, "--port": "0", "--folder": "tinker"},
        ("score",): {"model": reward, "file": rows["pairs"]},
        ("evaluate",): {"policy": place.base, "baseline": place.base, **judged},
        ("best-of",): {"policy": place.base, "-n": "2", **judged},
        ("export",): {"model": place.base, "dir": "exported"},
        ("init",): {"dir": "project"},
        ("configs",): {"action": "copy", "name": "sft", "dir": "copied"},
        ("report",): {"run": root / "done", "--output": "report.html"},
        ("filter", "apply"): {"rules": rules, "files": rows["chats"], "--output": "filtered"},
        ("filter", "evaluate"): {"rules": rules, "file": labeled},
        ("data", "check"): {"file": rows["chats"], "--kind": "sft", "--model": place.base},
        ("pipeline",): {"file": plan, "--root": "root"},
        ("quickstart",): {"--root": "root"},
    }


def test_all_commands_are_mutated(commands: dict[tuple[str, ...], Any]) -> None:
    assert {name for name, *_ in commands} | set(WITHIN) == set(COMMANDS)


def argv(command: tuple[str, ...], arguments: dict[str, Any], order: list[str]) -> list[str]:
    """The command line."""
    places = [str(arguments[name]) for name in order if name in arguments and not name.startswith("-")]
    flags = []
    for name, value in arguments.items():
        if name.startswith("-"):
            flags += [f"{name}={value}"] if name.startswith("--") else [name, str(value)]
    return [*command, *flags, *(["--"] if any(text.startswith("-") for text in places) else []), *places]


def as_text(value: Any) -> str:
    """A value as written on a command line."""
    return "null" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)


INSTEAD = {(("generate",), "file"): ("--prompt",), (("evaluate",), "--task"): ("--reward", "baseline")}
"""The arguments in whose place an argument is given."""


@of_counts(40)
def test_flags(count: int | None, commands: dict[tuple[str, ...], Any], case: Any) -> None:
    flags = {command: value_flags(command_parser(*command)) for command in commands}
    texts = {name: as_text(value) for name, value in VALUES.items() if name != "nul"}  # no command line can have it
    cases = [(command, flag, value) for command in commands for flag in flags[command] for value in texts]
    wrong = []
    for command, flag, value in some(cases, count):
        good = {k: v for k, v in commands[command].items() if k not in INSTEAD.get((command, flag), ())}
        folder, args = case(), argv(command, {**good, flag: texts[value]}, flags[command])
        # The stages of two commands are those of other tests, and a server would wait.
        stages = mock.patch.object(_Runner, "run", side_effect=Started)
        pages = mock.patch.object(uvicorn.Server, "run", side_effect=Started)
        data = mock.patch.object(rlhf_lightning.quickstart.run, "_inputs", side_effect=Started)
        with stages, data, pages, mock.patch.object(sys, "stdin", io.StringIO("Hello\n")):
            name = f"{' '.join(command)} {flag}"
            found = tried(lambda args=args: rlhf(*args), name, value)
        if isinstance(found, str) and ": Started: " in found:
            found = Result(0, "", "")
        meant = value in MEANT_FLAGS.get(name, MEANT_FLAGS.get(flag.lstrip("-"), ()))
        names = [flag.lstrip("-"), *NAMED_OTHERWISE.get(flag.lstrip("-"), ())]
        # A path or a model that is named tells as well what is meant.
        names += [visible(texts[value])[:90], texts[value][:90]] if texts[value] else []
        if isinstance(found, str) or (found := judge(command[0], name, value, found, names, meant)):
            wrong.append(found)
            print(found)  # each as it is found: all of them take a while
        assert sorted(path.name for path in folder.parent.glob("*.partial")) == []
    assert not wrong, f"{len(wrong)}\n" + "\n".join(map(str, wrong))
