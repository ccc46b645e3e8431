"""The reward of reasoning-gym: the task's own scores, and answers that would run code."""

import re
from pathlib import Path

import pytest

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.reasoning_gym import UNSUPPORTED, is_installed
from rlhf_lightning.data.records import read_rows
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.rewards import ReasoningGymReward
from rlhf_lightning.rewards.reasoning_gym import ARITHMETIC, LISTS, RUNS_ANSWERS
from rlhf_lightning.types import Episode, Row

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="the package reasoning-gym is not installed (extra reasoning-gym)"
)


def rows(source: str) -> list[Row]:
    return [row.data for row in read_rows(f"reasoning_gym:{source}")]


def episode(row: Row, answer: str) -> Episode:
    return Episode(prompt=[], row=row, group=0, responses=[{"role": "assistant", "content": answer}], where="a.jsonl:1")


def test_scores_are_those_of_the_task() -> None:
    import reasoning_gym

    task = reasoning_gym.create_dataset("chain_sum", size=3, seed=1)
    answers = [task[0]["answer"], f"It is {task[1]['answer']}.", "none"]
    reward = ReasoningGymReward()
    scores = reward.score(
        [episode(row, text) for row, text in zip(rows("chain_sum?size=3&seed=1"), answers, strict=True)]
    )
    assert scores == [task.score_answer(text, task[i]) for i, text in enumerate(answers)]
    assert scores[0] == 1.0
    assert 0 < (scores[1] or 0) < 1
    assert scores[2] == 0.0


def test_a_task_with_several_right_answers() -> None:
    """Its rows have no answer; its scorer uses values of the entry that JSON does not keep as they are."""
    (row,) = rows("graph_color?size=1&seed=3&min_num_vertices=3&max_num_vertices=3")
    assert row["answer"] is None
    reward = ReasoningGymReward()
    assert reward.score([episode(row, '{"0": 1, "1": 2, "2": 3}'), episode(row, '{"0": 1}')]) == [1.0, 0.01]


def test_where_the_answer_is() -> None:
    (row,) = rows("chain_sum?size=1&seed=1")
    right = str(row["answer"])
    reward = ReasoningGymReward(pattern="<answer>(.*?)</answer>")
    texts = [f"<answer>7</answer> no, <answer>\n{right} </answer>", right, f"<answer>{right}</answer> so {right}1"]
    assert reward.score([episode(row, text) for text in texts]) == [1.0, 0.0, 1.0]


def test_a_scorer_that_raises() -> None:
    (row,) = rows("prime_factorization?size=1")
    played = [episode(row, str(row["answer"])), episode(row, "two times three")]
    assert ReasoningGymReward(name="factors").score(played) == [1.0, 0.0]
    assert [one.details for one in played] == [{"factors_failed": 0.0}, {"factors_failed": 1.0}]


def test_rows_that_cannot_be_scored() -> None:
    (row,) = rows("chain_sum?size=1&seed=1")
    assert ReasoningGymReward().score([episode({"prompt": "Hi"}, "4")]) == [None]
    origin = row["reasoning_gym"]
    assert isinstance(origin, dict)
    wrong: list[tuple[Row, str]] = [
        ({"reasoning_gym": "chain_sum"}, "must have a task, parameters and an index"),
        ({"reasoning_gym": {**origin, "index": 1}}, "has no entry 1"),
        ({"reasoning_gym": {**origin, "task": "os"}}, "no reasoning-gym task 'os'"),
        ({"reasoning_gym": {**origin, "parameters": {"digits": 1}}}, "no parameter 'digits'"),
        ({"prompt": "What is 1 + 1?"}, "generates another question"),
    ]
    for changes, message in wrong:
        prompt = Prompt([], [1], {**row, **changes}, where="a.jsonl:1")
        with pytest.raises(DataError, match=f"^a.jsonl:1: .*{message}"):
            ReasoningGymReward().check([prompt])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{row['prompt']} Think."}]
    ReasoningGymReward().check([Prompt([], [1], {**row, "prompt": chat})])
    with pytest.raises(ConfigError, match="no row has the column 'reasoning_gym'"):
        ReasoningGymReward().check([Prompt([], [1], {"prompt": "Hi"})])


def test_tasks_that_evaluate_formulas_are_refused(tmp_path: Path) -> None:
    (row,) = rows("simple_integration?size=1")
    code = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    with pytest.raises(DataError, match=r"evaluates answers as Python code.*run_answers: true"):
        ReasoningGymReward().score([episode(row, code)])
    assert not (tmp_path / "ran").exists()
    ReasoningGymReward(run_answers=True).score([episode(row, code)])
    assert (tmp_path / "ran").exists()  # so it is one that must be refused


def code_in(path: Path) -> list[str]:
    """Answers that create a file if they are evaluated."""
    code = f"__import__('pathlib').Path({str(path)!r}).touch()"
    return [code, f"[{code}]", f"x + {code}", f"1 + {code}", f"f'{{{code}}}'", f"[1 for _ in [{code}]]"]


@pytest.mark.parametrize("name", sorted(LISTS | ARITHMETIC))
def test_answers_do_not_run_code(name: str, tmp_path: Path) -> None:
    """Scores are those of the package, and code gets that of an empty answer."""
    import reasoning_gym

    (row,) = rows(f"{name}?size=1")
    task = reasoning_gym.create_dataset(name, size=1, seed=0)
    reward, raw = ReasoningGymReward(), ReasoningGymReward(run_answers=True)
    answers = [
        str(row["answer"]),
        "(1 + 2) * 3.5 / 4",
        "[['A', 1], [-2, 'B']]",
        "ABC",
        "1 2\n3 4",
        "1 +",
        "[" * 300,
        "",
    ]
    if name in LISTS:
        answers.append(repr([list(line) for line in str(row["answer"]).split("\n")]))
    played = [episode(row, answer) for answer in answers]
    assert reward.score(played) == raw.score(played) == [task.score_answer(text, task[0]) for text in answers]
    assert reward.score(played[:1]) == [1.0]
    empty = task.score_answer("", task[0])
    assert reward.score([episode(row, text) for text in code_in(tmp_path / "ran")]) == [empty] * 6
    assert not (tmp_path / "ran").exists()
    raw.score([episode(row, text) for text in code_in(tmp_path / "ran")])
    assert (tmp_path / "ran").exists()


def test_an_answer_that_would_take_forever() -> None:
    (row,) = rows("countdown?size=1")
    assert ReasoningGymReward().score([episode(row, "9**9**9**9")]) == [0.01]


@pytest.mark.slow  # 30 s: every task is generated
def test_no_task_runs_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reasoning_gym.factory import DATASETS

    monkeypatch.setenv("PYTHONHASHSEED", "0")
    for name in sorted(DATASETS.keys() - UNSUPPORTED.keys() - RUNS_ANSWERS):
        (row,) = rows(f"{name}?size=1&seed=1")
        texts = [*code_in(tmp_path / "ran"), f"{row['answer']}\n{code_in(tmp_path / 'ran')[0]}"]
        ReasoningGymReward().score([episode(row, text) for text in texts])
        assert not (tmp_path / "ran").exists(), name


REVIEWED = {
    "arithmetic/basic_arithmetic.py",  # its own expression
    "arithmetic/bitwise_arithmetic.py",  # its own expression
    "arithmetic/gsm_symbolic/generators_00_49.py",  # constants
    "arithmetic/gsm_symbolic/generators_50_99.py",  # constants
    "algorithmic/number_sorting.py",  # the entry's answer, which is generated again
    "code/codeio.py",  # programs in the package's data
    "logic/propositional_logic.py",  # `parse_expr` is a function of that module
}
"""Files of the package that evaluate something else than an answer, by reading them in version 0.1.25."""


def test_files_that_evaluate_code_are_known() -> None:
    """A newer version of the package must not evaluate answers of further tasks unnoticed."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    root = Path(reasoning_gym.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        if re.search(r"(?<!def )\b(eval|exec|parse_expr|sympify)\(", path.read_text()):
            found.add(path.relative_to(root).as_posix())
    modules = {DATASETS[name][0].__module__ for name in RUNS_ANSWERS | LISTS | ARITHMETIC}
    tasks = {module.removeprefix("reasoning_gym.").replace(".", "/") + ".py" for module in modules}
    assert found == tasks | REVIEWED
