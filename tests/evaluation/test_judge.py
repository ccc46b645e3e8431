"""`rlhf evaluate --judge`: grades as a reward, and comparisons with the baseline in both orders."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli.judge_file import read_judge
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.compare import judged_wins
from rlhf_lightning.rewards import Judge, JudgeReward, PairwiseJudgeReward
from rlhf_lightning.rewards.judge import PairwiseJudgeScores
from rlhf_lightning.types import Episode
from tests.helpers.cli import mistake, rlhf_in_process
from tests.helpers.judge_server import Asked, serving
from tests.helpers.rows import prompts, write_rows

pytest.importorskip("openai")


def written(path: Path, url: str = "http://127.0.0.1:9/v1", **settings: Any) -> str:
    judge = {"url": url, "model": "judge-1", "key_variable": "", "backoff": 0, "cache": str(path.parent / "cache")}
    path.write_text(yaml.safe_dump({"judge": judge, **settings}))
    return str(path)


def test_grades_and_comparisons_of_a_policy(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(asked: Asked) -> str:
        text = asked["messages"][1]["content"]
        found = re.findall(r"BEGIN (?:\w+ )?response \w+\n(.*?)\nEND", text, re.DOTALL)
        if len(found) == 1:
            return json.dumps({"reason": "", "score": 4})
        return json.dumps({"reason": "", "better": "first" if found[0] > found[1] else "second"})

    write_rows(tmp_path / "prompts.jsonl", prompts(3))
    sampled = [str(tmp_path / "prompts.jsonl"), "--max_tokens", "4", "--json"]
    with serving(answer) as server:
        file = written(tmp_path / "grade.yaml", server.url, rubric="Good.", maximum=5)
        rlhf_in_process("evaluate", base, *sampled, "--judge", file)
        found = json.loads(capsys.readouterr().out)
        assert found["policy"]["reward"] == 4.0
        pairwise = written(tmp_path / "pairs.yaml", server.url, rubric="Good.", pairwise=True)
        rlhf_in_process("evaluate", base, base, *sampled, "--judge", pairwise, "--samples", "2")
        policy = json.loads(capsys.readouterr().out)["policy"]
        # The policies are the same and sample with the same seeds, so all pairs are ties.
        assert policy["judge_win_rate"] == 0.5
        assert {"judge_win_rate_low", "judge_win_rate_high"} <= policy.keys()
        assert policy["judge_order_bias"] == policy["judge_failed"] == 0
        assert "reward" not in policy
    assert "--judge: a pairwise judge compares a policy with a baseline" in mistake(
        ["evaluate", base, *sampled, "--judge", pairwise], capsys
    )


class Verdicts(PairwiseJudgeScores):
    """Given verdicts."""

    def __init__(self, *given: tuple[float, float] | None) -> None:
        self.given = list(given)

    def comparable(self, episode: Episode) -> bool:
        return "left out" not in episode.row

    def verdicts(self, pairs: Any) -> list[tuple[float, float] | None]:
        assert len(pairs) == len(self.given)
        return self.given


def test_win_rate_of_given_verdicts() -> None:
    groups = [[Episode([], {}, group) for _ in range(2)] for group in range(2)]
    groups[1].append(Episode([], {"left out": 1}, 1))
    found = judged_wins(Verdicts((1.0, -1.0), (1.0, 1.0), (-1.0, 1.0), None), groups, groups)
    # The first prompt: a win, and a draw by position; the second: a loss, and a pair without a verdict.
    assert found["judge_win_rate"] == pytest.approx((0.75 + 0.0) / 2)
    assert found["judge_order_bias"] == pytest.approx(1 / 3)
    assert found["judge_failed"] == 0.25
    nothing = judged_wins(Verdicts(None, None, None, None), groups, groups)
    assert nothing == {"judge_win_rate": None, "judge_order_bias": None, "judge_failed": 1.0}


def test_the_file_of_a_judge(tmp_path: Path) -> None:
    made = read_judge(Path(written(tmp_path / "judge.yaml", minimum=0, columns=["answer"], on_failure="skip")))
    assert isinstance(made, JudgeReward)
    assert isinstance(made.judge, Judge)
    assert (made.minimum, made.columns, made.on_failure, made.judge.votes) == (0, ["answer"], "skip", 1)
    example = read_judge(Path(__file__).parents[2] / "examples" / "judge.yaml")
    assert isinstance(example, PairwiseJudgeReward)
    assert example.judge.max_calls == 2000
    made_pairs = read_judge(Path(written(tmp_path / "judge.yaml", pairwise=True)))
    assert isinstance(made_pairs, PairwiseJudgeReward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rubrik": "x"}, "rubrik"),
        ({"minimum": "low"}, "minimum"),
        ({"maximum": 1}, "the maximum of the reward judge is 1; it must be at least 2"),
        ({"judge": {"url": "nowhere", "model": "m"}}, "must be a URL"),
        ({"judge": {"url": "http://h/v1"}}, "model"),
        ({"judge": {"url": "http://h/v1", "model": "m", "votes": 3}}, "all votes would be the same"),
        ({"pairwise": "yes please"}, "pairwise is 'yes please'; it must be true or false"),
        ({"pairwise": True, "minimum": 1}, "minimum"),
        ({"weight": 2.0}, "weight"),
    ],
)
def test_mistakes_in_the_file(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_judge(Path(written(tmp_path / "judge.yaml", **settings)))
    assert str(caught.value).startswith(f"--judge: {tmp_path / 'judge.yaml'}: ")
    with pytest.raises(ConfigError, match=r"--judge: .*no such file"):
        read_judge(tmp_path / "none.yaml")
