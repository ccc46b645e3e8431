"""Malformed files, configs, models and checkpoints: each gives a clear error or a counted skip.

None gives a traceback, hangs, or goes through as if nothing were wrong. The cases are sampled by hypothesis, the same
ones every time; the fast run takes some of each kind, the slow run at least 2,000. With RLHF_FUZZ_REPORT set to a
path, the counts are written there.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlhf_lightning.checkpointing.io import AtomicCheckpointIO, DamagedCheckpoint, newest_whole
from rlhf_lightning.files import hash_file, hash_folder
from tests.helpers.fuzzing import Place, Result, Tally, bad_rows, fuzz, refused, rlhf, write_report
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.runs import fork_stages

TALLY = Tally()
ROWS = {"sft": chats, "preference": pairs, "prompts": prompts}
COMMAND = {"sft": "sft", "preference": "preference", "prompts": "policy"}


def counts(fast: int, slow: int) -> Any:
    """A test with `fast` cases, and `slow` cases in the slow run."""
    marks = [pytest.mark.slow, pytest.mark.timeout(1800)]
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=marks)])


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    write_report(TALLY)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"), session_tokenizer)


# -- data files -------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", categories=["L", "P", "Zs"]), max_size=8)
SCALAR = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
JUNK = st.recursive(
    st.none() | SCALAR | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
NOT_TEXT = SCALAR | st.dictionaries(WORDS, JUNK, max_size=2)
USER, ASSISTANT = ({"role": role, "content": "Hello"} for role in ("user", "assistant"))
NOT_MESSAGES = st.one_of(
    NOT_TEXT,
    st.just([]),
    st.lists(SCALAR | st.lists(JUNK, max_size=2) | st.none(), min_size=1, max_size=3),
    st.builds(lambda role: [USER, {"role": role, "content": "a"}], SCALAR.filter(bool) | st.lists(WORDS, min_size=1)),
    st.builds(lambda content: [USER, {"role": "assistant", "content": content}], NOT_TEXT | st.none()),
    st.builds(lambda part: [USER, {"role": "assistant", "content": [part]}], SCALAR | st.none() | st.lists(JUNK)),
    st.just([USER, {"role": "assistant"}]),
    st.just([USER, {"role": "assistant", "content": "\ud800"}]),
)
NO_COLUMN = st.dictionaries(WORDS.map(lambda word: f"_{word}"), JUNK, max_size=3)


def with_value(row: dict[str, Any], name: str, values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(lambda value: {**row, name: value})


PAIR = {"prompt": "a", "chosen": "one", "rejected": "two"}
BAD_TOOLS = SCALAR.filter(bool) | st.just("[") | st.lists(SCALAR, min_size=1, max_size=2)
BAD_CALLS = st.one_of(
    SCALAR.filter(bool),
    st.sampled_from(["[", "{'name': 'f'}", '"f"']),
    st.lists(SCALAR | st.just({}), min_size=1, max_size=2),
    st.builds(
        lambda name, arguments: [{"function": {"name": name, "arguments": arguments}}],
        st.just("f") | SCALAR | st.none(),
        SCALAR | st.lists(JUNK, max_size=2) | st.sampled_from(["[1]", "{", "None", '{"a": NaN}']),
    ),
)


def refused_beside(row: dict[str, Any], *more: dict[str, Any]) -> st.SearchStrategy:
    """A good row with a column of common meaning that cannot be used."""
    return st.one_of(
        with_value(row, "system", SCALAR | st.lists(WORDS, min_size=1)),
        st.sampled_from(["image", "images", "audio", "video"]).map(lambda name: {**row, name: ["a.png"]}),
        st.sampled_from([{"system": "a", "system_prompt": "b"}, {"functions": "["}, *more]).map(lambda x: {**row, **x}),
    )


BAD_ROWS = {
    "sft": st.one_of(
        NO_COLUMN,
        BAD_CALLS.map(lambda calls: {"messages": [USER, {**ASSISTANT, "content": None, "tool_calls": calls}]}),
        BAD_CALLS.map(lambda calls: {"conversations": [USER, {"from": "function_call", "value": calls}]}),
        with_value({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "id", SCALAR),
        st.floats(0.01, 0.99).map(lambda weight: {"messages": [USER, {**ASSISTANT, "weight": weight}]}),
        refused_beside({"messages": [USER, ASSISTANT]}, {"label": 0}, {"label": False}, {"weight": 0.5}),
        refused_beside({"prompt": "a", "completion": "b"}, {"label": 0}, {"chosen": "c", "rejected": "d"}),
        refused_beside({"instruction": "a", "output": "b"}, {"label": False}, {"train": False}),
        with_value({}, "messages", NOT_MESSAGES | st.just([USER]) | st.just([USER, {**ASSISTANT, "content": "  "}])),
        with_value({}, "conversations", NOT_MESSAGES),
        with_value({}, "text", NOT_TEXT | st.just(" ") | st.lists(WORDS)),
        with_value({"messages": [USER, ASSISTANT]}, "tools", BAD_TOOLS),
        with_value({"prompt": "a"}, "completion", NOT_MESSAGES),
        with_value({"instruction": "a"}, "output", NOT_TEXT),
        with_value({"instruction": "a", "output": "b"}, "history", SCALAR.filter(bool) | st.lists(SCALAR, min_size=1)),
        st.just(PAIR),
    ),
    "preference": st.one_of(
        NO_COLUMN,
        *(with_value(PAIR, name, NOT_MESSAGES | st.none()) for name in PAIR),
        with_value(PAIR, "rejected", st.just("one")),
        refused_beside(PAIR, {"weight": 0}, {"chosen": [{**ASSISTANT, "train": False}]}),
        with_value(PAIR, "margin", WORDS | st.lists(JUNK) | st.booleans() | st.just(float("nan"))),
        with_value(PAIR, "tie", WORDS | st.lists(JUNK) | st.integers(2)),
        with_value(PAIR, "category", st.lists(JUNK) | st.floats(allow_nan=False)),
        with_value(PAIR, "tools", BAD_TOOLS),
        st.just({"messages": [USER, ASSISTANT]}),
    ),
    "prompts": st.one_of(
        NO_COLUMN,
        with_value({}, "prompt", NOT_MESSAGES | st.none()),
        with_value({}, "messages", NOT_MESSAGES.filter(lambda v: not isinstance(v, list)) | st.just([ASSISTANT])),
        with_value({"prompt": "a"}, "tools", BAD_TOOLS),
        refused_beside({"prompt": "a"}),
    ),
}
NOT_UTF8 = st.sampled_from([b"\xff", b"\xc3(", b"\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
NO_OBJECT = ["[1]", "3", "null", '"text"', "{", "{'a': 1}", '{"a": 1}}', '{"a": 1} {"a": 2}', "[" * 10**5, "NaN", "tru"]
NO_OBJECT += ['{"a":' * 10**5, '{"a": ' + "1" * 6000 + "}", '{"a": "\x00"}', '{"a": "\n"}', "a,b,c", "prompt\tchosen"]


@st.composite
def spoilt_files(draw: st.DrawFn) -> tuple[str, str, bytes, str, bool]:
    """Kind, suffix, bytes, how it is read, and whether only rows are bad (which can be skipped)."""
    kind = draw(st.sampled_from(sorted(ROWS)))
    good = [json.dumps(row).encode() for row in ROWS[kind](4)]
    how = draw(st.sampled_from(["check"] * 12 + ["fit", "fit", "skip"]))
    if draw(st.integers(0, 2)):
        row = json.dumps(draw(BAD_ROWS[kind])).encode()
        at = draw(st.integers(0, 4))
        lines = [*good[:at], row, *good[at:]]
        if how != "skip" and draw(st.booleans()):
            return kind, ".json", b"[" + b",".join(lines) + b"]", how, True
        return kind, ".jsonl", b"\n".join(lines) + b"\n", how, True
    text = b"\n".join(good) + b"\n"
    way = draw(st.sampled_from(["cut", "bytes", "line", "encoding", "empty", "binary", "json", "parquet", "name"]))
    suffix = ".jsonl"
    if way == "cut":
        line = good[-1]
        text = b"\n".join([*good[:-1], line[: draw(st.integers(1, len(line) - 1))]])
    elif way == "bytes":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(NOT_UTF8) + text[at:]
        suffix = draw(st.sampled_from([".jsonl", ".json", ".txt"]))
    elif way == "line":
        wrong = [line for line in NO_OBJECT if kind != "prompts" or line != '"text"']
        good.insert(draw(st.integers(0, 4)), draw(st.sampled_from(wrong)).encode())
        text = b"\n".join(good)
    elif way == "encoding":
        text = text.decode().encode(draw(st.sampled_from(["utf-16-be", "utf-16-le", "utf-32-be", "utf-32-le"])))
        suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".txt"]))
    elif way == "empty":
        text = draw(st.sampled_from([b"", b"\n", b" \n\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"]))
        suffix = draw(st.sampled_from([".jsonl", ".json", ".parquet", ".txt"]))
    elif way == "binary":
        text, suffix = draw(st.binary(min_size=1, max_size=60)), ".parquet"
    elif way == "json":
        suffix = ".json"
        wrong = NO_OBJECT if kind != "prompts" else [line for line in NO_OBJECT if line != '"text"']
        text = draw(st.sampled_from([b"[]", b"{}", b"[[]]", b"[1, {}]", *(w.encode() for w in wrong)]))
    elif way == "parquet":
        suffix = ".parquet"
        whole = parquet(ROWS[kind](4))
        text = whole[: draw(st.integers(1, len(whole) - 1))]
    else:
        suffix = draw(st.sampled_from([".parquet", ".csv", ".tsv", ".zip", ".xlsx", ".arrow"]))
    return kind, suffix, text, how.replace("skip", "fit"), False


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet as format

    stream = io.BytesIO()
    format.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


@counts(55, 1100)
def test_data_files(count: int, place: Place) -> None:
    configs = {kind: place.root / f"{kind}.yaml" for kind in ROWS}
    for kind, path in configs.items():
        path.write_text(yaml.safe_dump(place.config(COMMAND[kind])))

    def check(case: tuple[str, str, bytes, str, bool]) -> None:
        kind, suffix, text, how, only_rows = case
        file = place.clear() / f"spoilt{suffix}"
        file.write_bytes(text)
        if how == "check":
            result = rlhf("data", "check", file, "--kind", kind, "--model", place.base, "--json", "--samples", "0")
            if result.code == 1:
                listed = bad_rows(result)
                assert len(listed) == 1 or not only_rows, listed
                assert all(file.name in row["where"] and len(row["reason"]) > 15 for row in listed), listed
                TALLY.add("data", "listed by data check", case)
                return
            refused(result, file.name)
            TALLY.add("data", "refused by data check", case)
            return
        fit = [COMMAND[kind], "fit", "-c", configs[kind], "--trainer.default_root_dir", file.parent / "run"]
        fit += ["--data.train", file]
        if how == "skip":
            result = rlhf(*fit, "--data.on_bad_row", "skip")
            assert result.code == 0, result.err
            assert "skipped 1," in result.err, result.err
            TALLY.add("data", "skipped and counted", case)
            return
        message = refused(rlhf(*fit), file.name)
        assert not only_rows or f"{file.name}:" in message or f"{file.name}[" in message, message
        TALLY.add("data", "refused by fit", case)

    fuzz(spoilt_files(), check, count)


# -- configs ----------------------------------------------------------------------------------------------------------

LETTERS = st.text("bcdghkmpqrwxz", min_size=3, max_size=8)  # no word that YAML reads as a number, null or a boolean
NOT_INT = LETTERS | st.just([1, "x"]) | st.just({"a": 1}) | st.floats(0.1, 0.9) | st.just("1e-5x")
NOT_FLOAT = LETTERS | st.just([0.1]) | st.just({"a": 1}) | st.just("1e-5x")
NOT_BOOL = LETTERS | st.just([True]) | st.integers(2)
BELOW = st.integers(-(10**30), 0)
NEGATIVE = st.integers(-(10**20), -1) | st.floats(-1e30, -1e-3)
NO_NUMBER = st.sampled_from([float("nan"), float("inf"), float("-inf")])
NO_FILE = LETTERS.map(lambda word: f"{word}.jsonl") | st.integers() | st.just({"a": 1}) | st.just([])
NO_FOLDER = LETTERS.map(lambda word: f"./{word}") | LETTERS.map(lambda word: f"/{word}/{word}")
CLASSES = st.one_of(
    LETTERS.map(lambda word: f"{word}.{word.title()}"),
    LETTERS.map(lambda word: f"torch.optim.{word}"),
    st.sampled_from(["json.dumps", "os.system", "torch.nn.Linear", "torch", "", ".", "rlhf_lightning", "a b.c"]),
).map(lambda name: {"class_path": name})
NOT_CLASS = CLASSES | st.integers() | st.just([3]) | st.just({"init_args": {"a": 1}}) | st.just({"class_path": 3})
ADAMW, WARMUP = "torch.optim.AdamW", "rlhf_lightning.modules.schedules.Warmup"


def made_by(name: str, **arguments: st.SearchStrategy) -> st.SearchStrategy:
    """A class with one unsuitable argument."""
    pairs = [values.map(lambda value, k=key: {k: value}) for key, values in arguments.items()]
    return st.one_of(pairs).map(lambda init_args: {"class_path": name, "init_args": init_args})


TRAINER = {
    "trainer.max_epochs": NOT_INT,
    "trainer.max_steps": NOT_INT,
    "trainer.accumulate_grad_batches": NOT_INT | BELOW,
    "trainer.gradient_clip_val": NOT_FLOAT,
    "trainer.precision": LETTERS | st.integers(100) | st.just("8-bit"),
    "trainer.accelerator": LETTERS | st.just("cuda"),
    "trainer.devices": LETTERS | st.just(-3),
    "trainer.strategy": LETTERS | CLASSES,
    "trainer.callbacks": NOT_CLASS.map(lambda value: [value]),
    "trainer.logger": NOT_CLASS,
    "model.model": NO_FOLDER,
    "model.lora": LETTERS | st.just({"rank": -1}) | st.just({"target": ["wings"]}) | LETTERS.map(lambda k: {k: 1}),
    "model.optimizer": NOT_CLASS | made_by(ADAMW, lr=NOT_FLOAT | NEGATIVE, betas=st.just([2, 2]), color=st.just(1)),
    "model.lr_scheduler": NOT_CLASS | made_by(WARMUP, decay=LETTERS, steps=NOT_INT),
    "model.tokenizer": NO_FOLDER,
    "model.chat_template": LETTERS | st.just("{% for %}") | st.just("{{ nothing.at.all }}"),
    "model.dtype": LETTERS | st.integers() | st.just("save"),
    "model.max_tokens_per_batch": NOT_INT | BELOW,
    "model.gradient_checkpointing": NOT_BOOL,
    "model.memory_limit": LETTERS | BELOW,
    "data.train": NO_FILE | st.none(),
    "data.overlong": LETTERS | st.integers(),
    "data.on_bad_row": LETTERS | st.integers(),
    "data.columns": LETTERS | st.just([1]) | st.just({"messages": "dialog", "prompt": "dialog"}),
    "data.format": LETTERS,
    "data.template_kwargs": LETTERS | st.just([1]),
    "seed_everything": LETTERS | st.just([1]),
    "checkpoint_every": NOT_INT | st.integers(-100, -1),
    "keep": NOT_INT | BELOW,
    "log_level": LETTERS,
    "ckpt_path": LETTERS.map(lambda word: f"{word}.ckpt"),
}
ROWWISE = {
    "data.batch_size": NOT_INT | BELOW,
    "data.max_length": NOT_INT | BELOW | st.just(1),
    "data.validation_split": NOT_FLOAT | NEGATIVE | st.just(1000),
}
SETTINGS = {
    "sft": {**TRAINER, **ROWWISE, "data.train_on": LETTERS},
    "preference": {
        **TRAINER,
        **ROWWISE,
        "model.scorer": NOT_CLASS,
        "model.loss": NOT_CLASS
        | made_by("rlhf_lightning.objectives.preference.DPO", beta=NOT_FLOAT | NEGATIVE | NO_NUMBER)
        | made_by("rlhf_lightning.objectives.preference.BradleyTerry", label_smoothing=NOT_FLOAT | NEGATIVE),
        "data.kind": LETTERS | st.just("labels"),
    },
    "policy": {
        **TRAINER,
        "data.group_size": NOT_INT | BELOW | st.just(1),
        "data.prompts_per_round": NOT_INT | BELOW,
        "data.update_epochs": NOT_INT | BELOW,
        "data.minibatches": NOT_INT | BELOW | st.integers(9, 10**6),
        "data.max_prompt_tokens": NOT_INT | BELOW | st.just(1),
        "model.rewards": NOT_CLASS.map(lambda value: [value]) | LETTERS | st.just([]),
        "model.advantage": NOT_CLASS | st.just("GAE"),
        "model.objective": NOT_CLASS,
        "model.sampler": LETTERS | LETTERS.map(lambda key: {key: 1}),
        "model.sampler.max_tokens": NOT_INT | BELOW | st.integers(300, 10**30),
        "model.sampler.temperature": NOT_FLOAT | NEGATIVE | NO_NUMBER,
        "model.sampler.top_p": NOT_FLOAT | NEGATIVE | st.floats(1.1, 1e9) | NO_NUMBER,
        "model.sampler.top_k": NOT_INT | st.integers(-(10**9), -1),
        "model.kl": LETTERS | LETTERS.map(lambda key: {"coefficient": 0.1, key: 1}),
        "model.kl.coefficient": NOT_FLOAT | NEGATIVE | NO_NUMBER,
        "model.environment": LETTERS | LETTERS.map(lambda word: f"{word}.Env") | st.just("json.tool"),
        "model.limits": LETTERS | st.just({"max_turns": 0}) | st.just({"step_timeout": -1}),
        "model.truncated_reward": NOT_FLOAT | NO_NUMBER,
        "model.resample_groups": NOT_INT | st.integers(-100, -1),
        "model.max_staleness": NOT_INT | st.integers(101),
        "model.critic": LETTERS | st.just({}),
    },
}
STAGE = {"kind": "sft", "config": "sft.yaml"}
PLANS = st.one_of(
    JUNK.filter(lambda value: not isinstance(value, dict)),
    st.dictionaries(LETTERS, JUNK, min_size=1, max_size=3),
    st.builds(lambda value: {"stages": value}, JUNK),
    st.builds(lambda value: {"stages": [value]}, JUNK),
    st.builds(lambda key, value: {"stages": [{**STAGE, key: value}]}, LETTERS, JUNK),
    st.builds(lambda value: {"stages": [{**STAGE, "kind": value}]}, JUNK),
    st.builds(lambda value: {"stages": [{**STAGE, "config": value}]}, JUNK.filter(bool)),
    st.builds(lambda value: {"stages": [{**STAGE, "overrides": value}]}, JUNK.filter(bool)),
    st.builds(lambda value: {"stages": [{**STAGE, "start": value}]}, JUNK.filter(bool)),
    st.builds(lambda value: {"stages": [{**STAGE, "name": value}]}, st.sampled_from(["a/b", "..", ".", [1], {"a": 1}])),
    st.builds(lambda value: {"stages": [STAGE], "seed": value}, LETTERS | st.just([1]) | st.just({"a": 1})),
    st.builds(lambda value: {"stages": [STAGE, STAGE], "name": value}, LETTERS),
    st.builds(lambda value: {"stages": [{**STAGE, "on_failure": value}]}, JUNK.filter(bool)),
)
BROKEN = [
    "\t",
    "a: b: c\n",
    "[",
    "{",
    "*nothing\n",
    "!!python/object/apply:os.system ['true']\n",
    "model: !!python/name:os.system\n",
    "\x00",
    "- 1\n- 2\n",
    "just text\n",
    "'\n",
    "model: &a\n  - *a\n  x\n",
    "%YAML 9\n",
    "? [\n",
]


@st.composite
def spoilt_configs(draw: st.DrawFn) -> tuple[str, str, Any]:
    """Kind, what is spoilt, and by what: a key with its value, an unknown key, a section, or the text itself."""
    kind = draw(st.sampled_from(sorted(SETTINGS)))
    way = draw(st.sampled_from(["value"] * 8 + ["unknown", "section", "text"] + ["plan"] * 5))
    if way == "plan":
        return "pipeline", "plan", draw(PLANS)
    if way == "value":
        key = draw(st.sampled_from(sorted(SETTINGS[kind])))
        return kind, key, draw(SETTINGS[kind][key])
    if way == "unknown":
        section = draw(st.sampled_from(["", "model.", "data.", "trainer.", "model.optimizer.init_args."]))
        return kind, f"{section}{draw(LETTERS)}", draw(SCALAR | LETTERS | st.none())
    if way == "section":
        return kind, draw(st.sampled_from(["model", "data"])), draw(LETTERS | SCALAR | st.just([1]) | st.just({}))
    return draw(st.sampled_from([*SETTINGS, "pipeline"])), "text", (draw(st.sampled_from(BROKEN)), draw(st.booleans()))


@counts(30, 900)
def test_configs(count: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    configs = {kind: place.config(kind) for kind in SETTINGS}
    (place.root / "sft.yaml").write_text(yaml.safe_dump(configs["sft"]))
    configs["pipeline"] = {"name": "test", "stages": [STAGE]}

    def check(case: tuple[str, str, Any]) -> None:
        kind, key, value = case
        place.clear()
        file = place.root / "spoilt.yaml"
        if key == "text":
            whole = yaml.safe_dump(configs[kind])
            file.write_text(value[0] + whole if value[1] else value[0])
        elif key == "plan":
            file.write_text(yaml.safe_dump(value))
        else:
            file.write_text(yaml.safe_dump(laid(configs[kind], key, value)))
        if kind == "pipeline":
            refused(rlhf("pipeline", file, "--root", place.case / "run"), "pipeline", "spoilt.yaml", "stage")
        else:
            names = ["spoilt.yaml"] if key == "text" else key.split(".")[-2:]
            names += ["chat template"] if key == "model.chat_template" else []
            result = rlhf(kind, "fit", "-c", file, "--trainer.default_root_dir", place.case / "run")
            refused(result, *names, str(value))
        TALLY.add("config", f"{kind} refused", case)

    fuzz(spoilt_configs(), check, count)


def laid(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the settings with one value."""
    copy = json.loads(json.dumps(settings))
    *path, last = key.split(".")
    inner = copy
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return copy


# -- model folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(place: Place) -> tuple[dict[str, Path], Callable[[str, Path], tuple[Result, Any]]]:
    """A base, an adapter and a reward model, each with the command that uses it and its output if it is intact."""
    rows = write_rows(place.root / "asked.jsonl", pairs(3))
    conversations = write_rows(place.root / "checked.jsonl", chats(3))
    for kind, lora in (("sft", ["--model.lora.rank", "2"]), ("preference", [])):
        config = place.root / f"{kind}-model.yaml"
        config.write_text(yaml.safe_dump(place.config(kind)))
        made = rlhf(kind, "fit", "-c", config, "--trainer.default_root_dir", place.root / f"run-{kind}", *lora)
        assert made.code == 0, made.err
    folders = {"base": Path(place.base)}
    folders |= {"adapter": place.root / "run-sft" / "model", "reward": place.root / "run-preference" / "model"}

    greedy = ["--temperature", "0", "--max_tokens", "8"]

    def use(command: str, folder: Path) -> tuple[Result, Any]:
        if command == "export":
            written = place.root / "exported"
            shutil.rmtree(written, ignore_errors=True)
            result = rlhf("export", folder, written)
            weights = sorted(written.glob("*.safetensors")) if result.code == 0 else []
            return result, [(path.name, hash_file(path)) for path in weights]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO("Count\nAgain\n"))
            args: dict[str, list[Any]] = {
                "chat": ["chat", folder, *greedy],
                "generate": ["generate", folder, "--prompt", "Count", *greedy, "--json"],
                "evaluate": ["evaluate", folder, rows, *greedy, "--json"],
                "data check": ["data", "check", conversations, "--kind", "sft", "--model", folder, "--json"],
                "score": ["score", folder, rows],
                "evaluate reward": ["evaluate", folders["base"], rows, *greedy, "--reward", folder, "--json"],
            }
            result = rlhf(*args[command])
        return result, result.out

    return folders, use


USES = {
    "base": ["generate", "generate", "chat", "export", "evaluate", "data check"],
    "adapter": ["generate", "generate", "chat", "export"],
    "reward": ["score", "score", "evaluate reward", "export"],
}
FILES = {
    "base": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"],
    "reward": ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "stage.json"],
}
SIZES = ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "head_dim", "num_key_value_heads"]
KEYS = {
    "config.json": st.tuples(st.sampled_from(SIZES), st.integers(33, 90) | LETTERS | st.integers(-5, 0) | st.just([1]))
    | st.tuples(st.sampled_from(["model_type", "num_hidden_layers"]), LETTERS | st.just([1]) | st.just(7))
    | st.tuples(st.just("hidden_act"), LETTERS),
    "adapter_config.json": st.tuples(st.just("base_model_name_or_path"), NO_FOLDER | st.integers() | st.just([1]))
    | st.tuples(st.just("peft_type"), LETTERS | st.integers())
    | st.tuples(st.just("r"), st.integers(3, 50) | LETTERS | st.integers(-3, 0))
    | st.tuples(st.just("target_modules"), st.just(["wings"]) | st.integers(1)),
    "stage.json": st.tuples(st.just("scorer"), LETTERS | st.integers(1) | st.just({"name": "os.system"})),
}


ODD = ["directory", "pipe", "device", "loop", "nowhere", "outside", "deep", "twice"]
"""What may stand where a file should, and JSON that is none of ours."""
PLACES = st.lists(st.integers(0, 30), min_size=1, max_size=4)
VALUES = st.one_of(
    JUNK,
    st.sampled_from(
        [10**30, -(10**30), 1e308, float("nan"), float("inf"), "../../../etc", "/dev/zero", "\x00", "\ud800"]
    ),
)


@st.composite
def spoilt_folders(draw: st.DrawFn) -> tuple[str, str, str, str, Any]:
    """Model, file, kind of damage, and its details."""
    model = draw(st.sampled_from(sorted(FILES)))
    command = draw(st.sampled_from(USES[model]))
    file = draw(st.sampled_from(FILES[model]))
    ways = ["empty", "cut", "binary"]
    if model == "reward" or file != "chat_template.jinja":  # `generate` completes plain text without a template
        ways.append("gone")
    ways += ["json", "json"] if file.endswith(".json") else []
    ways += ["key"] * 5 if file in KEYS else []
    ways += ["tensors"] * 6 if file.endswith(".safetensors") else []
    ways += [draw(st.sampled_from(ODD))] * 2 + (["value"] * 4 if file.endswith(".json") else [])
    way = draw(st.sampled_from(ways))
    details = {
        "cut": st.floats(0.02, 0.97),
        "value": st.tuples(PLACES, VALUES),
        "binary": st.binary(min_size=1, max_size=40),
        "json": JUNK,
        "key": KEYS.get(file, st.none()),
        "tensors": st.tuples(
            st.sampled_from(["drop", "wider", "shorter", "flat", "rename", "header"]), st.integers(0, 99)
        ),
    }
    return model, command, file, way, draw(details.get(way, st.none()))


def spoil(path: Path, way: str, detail: Any) -> None:
    if way == "gone":
        path.unlink()
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "cut":
        os.truncate(path, int(path.stat().st_size * detail))
    elif way == "binary":
        path.write_bytes(detail)
    elif way == "json":
        path.write_text(json.dumps(detail))
    elif way in ODD:
        _replace(path, way)
    elif way == "value":
        settings = json.loads(path.read_text())
        replaced = _at(settings, *detail)
        path.write_text(json.dumps(replaced))
    elif way == "key":
        path.write_text(json.dumps({**json.loads(path.read_text()), detail[0]: detail[1]}))
    elif detail[0] == "header":
        whole = path.read_bytes()
        path.write_bytes(bytes([detail[1] + 1]) + whole[1:] if detail[1] % 2 else whole[:8] + b"x" + whole[9:])
    else:
        _spoil_tensors(path, *detail)


def _replace(path: Path, way: str) -> None:
    """Something else in place of a file, or a text that no parser should accept."""
    before = path.read_bytes()
    path.unlink()
    outside = path.parent.parent / "secret"
    links = {"device": "/dev/zero", "loop": path, "nowhere": path.with_name("none"), "outside": outside}
    if way == "directory":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "deep":
        path.write_text("[" * 10**5)
    elif way == "twice":
        path.write_bytes(before.replace(b"{", b'{"twice": 1, "twice": 2, ', 1) if before[:1] == b"{" else b"{" + before)
    else:
        outside.write_bytes(before)
        path.symlink_to(links[way])


def _at(settings: Any, places: list[int], value: Any) -> Any:
    """Settings with one value replaced, at the position that numbers select."""
    if not places or not isinstance(settings, dict | list) or not settings:
        return value
    keys = sorted(settings) if isinstance(settings, dict) else range(len(settings))
    key = keys[places[0] % len(keys)]
    copy = dict(settings) if isinstance(settings, dict) else list(settings)
    copy[key] = _at(settings[key], places[1:], value)
    return copy


def parses(path: Path) -> bool:
    """True if the rest of a chat template is a valid template."""
    try:
        jinja2.Environment().parse(path.read_text())
    except jinja2.TemplateSyntaxError:
        return False
    return True


def _spoil_tensors(path: Path, how: str, number: int) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[number % len(tensors)]
    tensor = tensors.pop(name)
    if how == "wider":
        tensors[name] = torch.cat([tensor, tensor], -1)
    elif how == "shorter":
        tensors[name] = tensor[..., :-1].contiguous()
    elif how == "flat":
        tensors[name] = tensor.flatten() if tensor.dim() > 1 else tensor[:, None].contiguous()
    elif how == "rename":
        tensors[f"x{name}"] = tensor
    save_file(tensors, path, {"format": "pt"})


@counts(40, 900)
def test_model_folders(count: int, place: Place, models: Any) -> None:
    folders, use = models

    def fresh(name: str) -> Path:
        return Path(shutil.copytree(folders[name], place.clear() / "model"))

    whole = {(name, command): use(command, fresh(name)) for name in USES for command in USES[name]}
    assert all(result.code == 0 for result, _ in whole.values()), whole

    def check(case: tuple[str, str, str, str, Any]) -> None:
        name, command, file, way, detail = case
        copy = fresh(name)
        spoil(copy / file, way, detail)
        result, made = use(command, copy)
        other = file.endswith(".jinja") and way in ("cut", "twice", "deep") and parses(copy / file)
        other |= file.startswith("tokenizer") and way == "value"
        harmless = made == whole[name, command][1] or other
        if result.code == 0 and harmless:
            return  # of no consequence, or another template or tokenizer that nobody can tell from a wanted one
        refused(result, str(copy), file, str(detail))
        TALLY.add("model", f"{name} refused", case)

    fuzz(spoilt_folders(), check, count)


# -- folders of runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(place: Place) -> Path:
    """A finished pipeline of two stages and a single stage, with samples, warnings and reports."""
    folder = place.root / "runs"
    folder.mkdir()
    for kind in ("sft", "preference"):
        config = place.config(kind)
        config["data"]["validation"] = config["data"]["train"]
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(config))
    stages = [{"kind": kind, "config": str(folder / f"{kind}.yaml")} for kind in ("sft", "preference")]
    stages[1]["start"] = "sft"
    (folder / "plan.yaml").write_text(yaml.safe_dump({"name": "x", "stages": stages}))
    with pytest.MonkeyPatch.context() as patch:
        fork_stages(patch)
        made = rlhf("pipeline", folder / "plan.yaml", "--root", folder / "whole")
    assert made.code == 0, made.err
    prompt = [{"role": "user", "content": "Hi"}]
    sample = {"prompt": prompt, "response": "a", "reward": 1.0, "response_tokens": 1, "stop_reason": "stop"}
    lines = "".join(json.dumps({"step": step, **sample}) + "\n" for step in (0, 1))
    (folder / "whole" / "sft" / "samples.jsonl").write_text(lines)
    (folder / "whole" / "sft" / "warnings.jsonl").write_text('{"step": 1, "name": "a", "message": "b"}\n')
    curve = [{"pairs": 3, "confidence": 0.7, "accuracy": 0.6}]
    report = {"step": 1, "numbers": {"ece": 0.1, "accuracy_a": 0.5}, "reliability": curve}
    (folder / "whole" / "preference" / "preference_report.json").write_text(json.dumps(report))
    answers = {"prompt": "a", "sft": "b", "policy": "c"}
    (folder / "whole" / "summary.json").write_text(json.dumps({"base": {"kl": 1.0}, "samples": [answers]}))
    return folder


RUN_FILES = {
    "report": ["manifest.json", "summary.json", "pipeline.yaml"]
    + [f"sft/{name}" for name in ("stage.json", "config.yaml", "metrics.csv", "samples.jsonl", "warnings.jsonl")]
    + ["preference/preference_report.json", "preference/stage.json"],
    "verify": ["manifest.json", "sft/stage.json", "sft/input.yaml", "preference/stage.json"],
    "again": ["manifest.json", "sft/stage.json", "preference/stage.json"],
}


@st.composite
def spoilt_runs(draw: st.DrawFn) -> tuple[str, str, str, Any]:
    """Command, file, kind of damage, and its details."""
    command = draw(st.sampled_from(["report"] * 6 + ["verify"] * 5 + ["again"]))
    file = draw(st.sampled_from(RUN_FILES[command]))
    ways = ["binary", *ODD] + (["cut", "empty", "json", "json"] + ["value"] * 8 if file.endswith(".json") else [])
    ways += ["row"] * 6 if file.endswith("jsonl") else []
    way = draw(st.sampled_from(ways))
    details = {
        "cut": st.floats(0.02, 0.97),
        "binary": st.binary(min_size=1, max_size=40),
        "json": JUNK,
        "value": st.tuples(PLACES, VALUES),
        "row": st.tuples(PLACES, VALUES),
    }
    return command, file, way, draw(details.get(way, st.none()))


@pytest.mark.usefixtures("forked_stages")
@counts(25, 300)
def test_run_folders(count: int, place: Place, runs: Path) -> None:
    """`report`, `pipeline --verify` and the same pipeline again, on a folder with one altered file."""
    run = place.case / "run"

    def use(command: str) -> Any:
        if command == "report":
            return rlhf("report", run, "--output", place.case / "page.html")
        if command == "verify":
            return rlhf("pipeline", "--verify", run)
        return rlhf("pipeline", runs / "plan.yaml", "--root", run)

    def check(case: tuple[str, str, str, Any]) -> None:
        command, file, way, detail = case
        place.clear()
        shutil.copytree(runs / "whole", run)
        path = run / file
        if way == "row":
            path.write_text(json.dumps(_at(json.loads(path.read_text().splitlines()[0]), *detail)) + "\n")
        else:
            spoil(path, way, detail)
        result = use(command)
        if result.code == 2:
            refused(result, path.name, path.parent.name, "sft", "pipeline")
            TALLY.add("run", f"refused by {command}", case)
            return
        assert "Traceback" not in result.err + result.out, result.err
        if command == "verify" and result.code == 1:
            assert "differ from the record" in result.out
            TALLY.add("run", "listed by verify", case)
            return
        assert result.code == 0, f"{result.code} {result.out[-500:]} {result.err[-2000:]}"
        # Other values of the right kind, which nobody can tell, and parts of what a run is still writing.
        broken = way in ODD and way != "outside" and file.endswith("json")
        assert not broken, f"{command} took it: {result.out}"

    fuzz(spoilt_runs(), check, count)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(place: Place) -> tuple[list[Any], Path, Path]:
    """The command of a run of two steps that was stopped after one, its folder, and a copy of it."""
    config = place.root / "resumed.yaml"
    config.write_text(yaml.safe_dump(place.config("sft", batch_size=6)))
    run, copy = place.root / "stopped", place.root / "stopped-copy"
    command = ["sft", "fit", "-c", config, "--checkpoint_every", "1", "--trainer.default_root_dir", run]
    made = rlhf(*command)
    assert made.code == 0, made.err
    (run / "stage.json").unlink()
    shutil.rmtree(run / "model")
    run.rename(copy)
    return [*command, "--trainer.max_steps", "2"], run, copy


@st.composite
def spoilt_checkpoints(draw: st.DrawFn) -> tuple[str, Any]:
    """Kind of damage to a checkpoint, and its details."""
    way = draw(st.sampled_from(["flip"] * 10 + ["cut"] * 5 + ["zeros"] * 4 + ["replace"] * 3 + ["content"] * 4))
    places = st.floats(0, 0.999999)
    contents = {
        "flip": st.tuples(places, st.integers(0, 7)),
        "cut": places,
        "zeros": st.tuples(places, st.integers(1, 5000)),
        "replace": st.binary(max_size=80),
        "content": JUNK
        | st.sampled_from(["no state_dict", "no loops", "no weight", "other shape", "no optimizer", "keys"]),
    }
    return way, draw(contents[way])


def altered(good: bytes, path: Path, way: str, detail: Any) -> None:
    """Write a damaged checkpoint."""
    if way == "flip":
        at = int(detail[0] * len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << detail[1]]) + good[at + 1 :])
    elif way == "cut":
        path.write_bytes(good[: int(detail * len(good))])
    elif way == "zeros":
        at = int(detail[0] * len(good))
        gap = min(detail[1], len(good) - at)
        path.write_bytes(good[:at] + bytes(gap) + good[at + gap :])
    elif way == "replace":
        path.write_bytes(detail)
    else:
        torch.save(_content(torch.load(io.BytesIO(good), weights_only=True), detail), path)


def _content(state: dict[str, Any], detail: Any) -> Any:
    weights = state["state_dict"]
    name = sorted(weights)[0]
    if detail == "no weight":
        weights.pop(name)
    elif detail == "other shape":
        weights[name] = weights[name].flatten()[:-1]
    elif detail == "keys":
        state["state_dict"] = {f"x{key}": value for key, value in weights.items()}
    elif isinstance(detail, str) and detail.startswith("no "):
        key = {"no optimizer": "optimizer_states"}.get(detail, detail.removeprefix("no "))
        state.pop(key, None)
    else:
        return detail
    return state


@counts(30, 500)
def test_checkpoints(count: int, place: Place, saved: tuple[list[Any], Path, Path]) -> None:
    """Flipped bits and truncation are detected by checksums, and the run starts over; other content is refused."""
    command, run, copy = saved
    good = (copy / "checkpoints" / "step=1.ckpt").read_bytes()
    state = repr(torch.load(io.BytesIO(good), weights_only=True))
    turns = [0]

    def check(case: tuple[str, Any]) -> None:
        way, detail = case
        folder = place.clear() / "checkpoints"
        folder.mkdir()
        path = folder / "step=1.ckpt"
        altered(good, path, way, detail)
        turns[0] += 1
        if way != "content" and turns[0] % 10:
            found, wrong = newest_whole(folder)
            if found:  # a date, a gap between entries: of no consequence
                assert repr(AtomicCheckpointIO().load_checkpoint(path, weights_only=True)) == state, "other content"
                return
            assert "step=1.ckpt is damaged" in wrong[0]
            with pytest.raises(DamagedCheckpoint, match=r"step=1\.ckpt: the checkpoint is damaged"):
                AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
            TALLY.add("checkpoint", "damage found", case)
            return
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(copy, run)
        shutil.copy(path, run / "checkpoints" / "step=1.ckpt")
        result = rlhf(*command)
        if "is damaged" in result.err:
            assert result.code == 0, result.err
            assert "starting over" in result.err
            TALLY.add("checkpoint", "run starts over, saying so", case)
        elif way == "content" or result.code:
            refused(result, "checkpoint")
            TALLY.add("checkpoint", "refused", case)

    fuzz(spoilt_checkpoints(), check, count)


INTERRUPTED = ["config.yaml", "sources.json", "metrics.csv", "run.lock", "logs/run.log"]


@st.composite
def spoilt_records(draw: st.DrawFn) -> tuple[str, str, Any]:
    """A file of an interrupted run, what is done to it, and with what."""
    file = draw(st.sampled_from(INTERRUPTED))
    ways = ["empty", "cut", "cut", "binary", *ODD] + (["json", *["value"] * 6] if file.endswith(".json") else [])
    way = draw(st.sampled_from(ways))
    details = {
        "cut": st.floats(0.02, 0.97),
        "binary": st.binary(min_size=1, max_size=40),
        "json": JUNK,
        "value": st.tuples(PLACES, VALUES),
    }
    return file, way, draw(details.get(way, st.none()))


@counts(15, 250)
def test_interrupted_runs(count: int, saved: tuple[list[Any], Path, Path]) -> None:
    """The command again, in a folder of which one file is not as written: refused, or the same results."""
    command, run, copy = saved

    def again(spoiling: Callable[[], None] = lambda: None) -> Result:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(copy, run)
        spoiling()
        return rlhf(*command)

    made = again()
    assert made.code == 0, made.err
    assert "resuming" in made.err
    weights = hash_folder(run / "model")

    def check(case: tuple[str, str, Any]) -> None:
        file, way, detail = case
        result = again(lambda: spoil(run / file, way, detail))
        if result.code == 0:
            assert "resuming" in result.err, result.err
            assert hash_folder(run / "model") == weights
            return
        refused(result, Path(file).name, str(run))
        TALLY.add("interrupted", "refused", case)

    fuzz(spoilt_records(), check, count)
