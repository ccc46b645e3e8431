"""Whole optimizer steps against TRL 1.16.0, see `benchmarks/parity`; needs the `benchmark` extra."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from benchmarks.parity import cases, setup
from benchmarks.parity.report import table

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TOLERANCE = 1e-5
# It divides the rounding of scores by 0.05; TRL is as far from itself when it computes rows in another order.
LOOSE = {"dpo: discopop": TOLERANCE / 0.05}
FAST = ["sft", "reward", "dpo: sigmoid", "kto", "rl: grpo, kl", "rl: rloo"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> setup.Folders:
    return setup.make_folders(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", FAST)
def test_step_equals_trl(name: str, folders: setup.Folders, tmp_path: Path) -> None:
    ours, theirs = cases.run(name, folders, tmp_path)
    assert len(ours) == len(theirs) == 1 + name.startswith("rl")
    for one, other in zip(ours, theirs, strict=True):
        assert [ids for ids, _ in one.rows] == [ids for ids, _ in other.rows]
        assert name == "reward" or one.rows == other.rows
        assert one.loss == pytest.approx(other.loss, rel=TOLERANCE, abs=TOLERANCE)
        assert other.norm > 0
        assert one.distance(other) < TOLERANCE


def test_wrong_rate_or_mask_is_detected(folders: setup.Folders, tmp_path: Path) -> None:
    """The comparison detects other settings on one side in loss, gradient and rows."""
    from benchmarks.parity import our_side

    rows = setup.conversations(4)
    first = our_side.supervised("sft", folders, rows, tmp_path)[0]
    other = our_side.supervised("sft", folders, [*rows[:3], *setup.conversations(6)[5:]], tmp_path)[0]
    assert first.rows != other.rows
    assert first.distance(other) > 1e-2
    assert abs(first.loss - other.loss) > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_case_and_difference_is_documented() -> None:
    from benchmarks.parity.__main__ import measure

    report = measure()
    assert set(report["cases"]) == set(cases.names())
    for name, steps in report["cases"].items():
        for step in steps:
            assert step["same_tokens"], name
            assert step["same_mask"] is not False, name
            assert step["norm"] > 0, name
            assert step["ours"] == pytest.approx(step["trl"], rel=TOLERANCE, abs=TOLERANCE), name
            assert step["difference"] < LOOSE.get(name, TOLERANCE), name
    _check_differences({row["name"]: {n[0]: n[1:] for n in row["numbers"]} for row in report["differences"]})
    assert len(table(report).splitlines()) > len(report["cases"])


def _check_differences(found: dict[str, Any]) -> None:
    change = "gradient's relative change"
    for name, row in found.items():
        if change in row:
            assert row[change][0] < TOLERANCE, name
    for name in ("DPO's sft term", "DPO, aot_unpaired, in parts", "KTO, in parts", "GRPO's bnpo, in parts"):
        assert found[name][change][1] > 10 * TOLERANCE, name
    for name in ("GRPO, in parts", "SFT, in parts"):
        assert found[name][change][1] < TOLERANCE, name
    early = found["reward model, padding is the stop token"]
    plain = "loss by a plain forward of each row, read at its stop token"
    assert early["loss"] == pytest.approx((early[plain][0], early["… read one token before"][1]), rel=TOLERANCE)
    assert abs(early["loss"][0] - early["loss"][1]) > 0.01
    ends = found["SFT, line break after the stop token"]["last trained token of a row"]
    assert list(ends) == ["'<|im_end|>'", "'\\n'"]
    assert abs(found["DPO, ipo"]["loss"][0] - found["DPO, ipo"]["loss"][1]) > 0.1
    assert found["DPO, bco_pair"]["gradient's relative difference"][1] > 10 * TOLERANCE


def test_committed_table_equals_the_committed_results() -> None:
    report = json.loads((RESULTS / "parity.json").read_text())
    assert (RESULTS / "parity.md").read_text() == table(report)
    assert set(report["cases"]) == set(cases.names())
    assert report["machine"]["versions"]["trl"] == "1.16.0"
