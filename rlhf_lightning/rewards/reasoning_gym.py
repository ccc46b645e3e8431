"""A reward that scores an answer as its task of the package reasoning-gym does."""

import ast
import re
from collections.abc import Sequence

from rlhf_lightning.data.prompts import Prompt, prompt_messages
from rlhf_lightning.data.reasoning_gym import COLUMN, ScoredEntry, package_version, task_entry
from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.required_literals import required_literal
from rlhf_lightning.rewards.verifiers import compiled, find_answer
from rlhf_lightning.types import Episode, Row

# The scorers of these tasks pass the answer to `eval`, some of them through `sympy.parse_expr`.
RUNS_ANSWERS = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
"""Tasks whose answers are formulas, so that an answer can run code."""
LISTS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose answers may be lists in Python's form. What evaluates anything else is not passed on."""
ARITHMETIC = frozenset({"countdown", "puzzle24"})
"""Tasks whose answers are terms of numbers. Anything else is not passed on."""
_TERM = re.compile(r"[0-9 +\-*/().]{1,200}")
_LITERAL = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.UnaryOp, ast.USub, ast.Load)


class ReasoningGymReward(Reward):
    """The score that a task of reasoning-gym gives to an answer, usually from 0 to 1.

    Rows come from a data source `reasoning_gym:TASK`. Their column `reasoning_gym` has the task, its parameters and the
    index, from which the scored entry is generated again. The reward does not apply to rows without that column.

    Some scorers raise an exception for an answer of another form than they expect. Its score is 0, and the fraction of
    such answers is logged as `reward_NAME_failed`.

    Args:
        pattern: Regular expression that finds the answer in the response: its last match, or that match's first group.
            A dot also matches line breaks. By default the whole response is the answer. White space around the answer
            is removed.
        run_answers: If True, also score the tasks of `RUNS_ANSWERS`, and pass every answer on as it is. Scorers that
            evaluate it as Python code then let the policy run code in this process: isolate the machine.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.
        skip_special_tokens: If False, responses are read exactly as sampled.

    Raises:
        ConfigError: If the pattern is invalid.

    Example:
        ```python
        rows = "reasoning_gym:chain_sum?min_terms=2&seed=1"
        module = PolicyRLModule(model, rewards=[ReasoningGymReward(pattern="<answer>(.*?)</answer>")])
        trainer.fit(module, PromptDataModule(rows))
        ```
    """

    def __init__(
        self,
        pattern: str = "",
        run_answers: bool = False,
        weight: float = 1.0,
        name: str | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(weight, name)
        self.skip_special_tokens = skip_special_tokens
        self.pattern = compiled(pattern, f"the reward {self.name}: pattern", re.DOTALL) if pattern else None
        self.run_answers = run_answers

    def check(self, prompts: Sequence[Prompt]) -> None:
        super().check(prompts)
        if prompts and not any(prompt.row.get(COLUMN) for prompt in prompts):
            raise ConfigError(
                f"the reward {self.name}: no row has the column {COLUMN!r}, so it would never apply; set data.train to "
                "a task, for example reasoning_gym:chain_sum"
            )

    def check_hidden(self, texts: Sequence[str], rows: Sequence[tuple[Row, str]] = ()) -> None:
        if self.pattern is not None:
            self.refuse_hidden(f"its pattern {self.pattern.pattern!r}", required_literal(self.pattern, texts))

    def check_row(self, row: Row) -> None:
        self._entry(row)

    def score_one(self, episode: Episode) -> float | None:
        found = self._entry(episode.row)
        if found is None:
            return None
        answer = find_answer(self.pattern, self.text(episode))
        if answer is not None:
            answer = answer.strip()
            if not self.run_answers and not _is_harmless(found.name, answer):
                answer = ""
        failed = f"{self.name}_failed"
        episode.details[failed] = 0.0
        try:
            return float(found.task.score_answer(answer, found.entry))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError):
            # Some scorers parse an answer without checking its form; the answer is then wrong.
            episode.details[failed] = 1.0
            return 0.0

    def _entry(self, row: Row) -> ScoredEntry | None:
        """The entry of a row, generated again; None if the row is not from a task.

        An entry is not stored in its row, because it has values that JSON has no types for, and because some scorers
        evaluate parts of the entry as Python code.
        """
        origin = row.get(COLUMN)
        if origin is None:
            return None
        if (
            not isinstance(origin, dict)
            or not isinstance(name := origin.get("task"), str)
            or not isinstance(parameters := origin.get("parameters"), dict)
            or not isinstance(index := origin.get("index"), int | float)
            or index != int(index)  # a whole number may be a floating-point number in rows from Parquet or pandas
        ):
            raise RowError(f"{COLUMN!r} is {origin!r}; it must have a task, parameters and an index")
        if name in RUNS_ANSWERS and not self.run_answers:
            raise RowError(
                f"the scorer of the reasoning-gym task {name!r} evaluates answers as Python code, so the policy could "
                f"run code in this process. Set run_answers: true of the reward {self.name} on an isolated machine, or "
                "choose another task"
            )
        try:
            found = task_entry(name, parameters, int(index))
        except DataError as error:
            raise RowError(str(error)) from None
        if not any(found.entry["question"] in (message["content"] or "") for message in prompt_messages(row)):
            raise RowError(
                f"the installed reasoning-gym {package_version()} generates another question than the row has; "
                "generate the rows again, or install the version that they are from"
            )
        return found


def _is_harmless(name: str, answer: str) -> bool:
    """False if the scorer of a task would evaluate an answer that is more than a list or a term of numbers.

    A task gives such an answer the same score as an empty one, unless it happens to evaluate to the right value.
    """
    if name in ARITHMETIC:
        return _TERM.fullmatch(answer) is not None and "**" not in answer  # 9**9**9 would take forever
    if name not in LISTS:
        return True
    try:
        return all(isinstance(node, _LITERAL) for node in ast.walk(ast.parse(answer, mode="eval")))
    except (SyntaxError, ValueError):
        return True  # `eval` raises the same, and the scorer goes on
    except (RecursionError, MemoryError):
        return False
