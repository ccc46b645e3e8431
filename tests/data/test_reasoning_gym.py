"""Tasks of reasoning-gym as data: rows, parameters, refusals, and what their generation depends on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.cli.data_record import check_data_record
from rlhf_lightning.data import reasoning_gym as ours
from rlhf_lightning.data.names import check_there, is_here
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.records import fingerprint, hashed_files, read_rows
from rlhf_lightning.errors import DataError
from rlhf_lightning.types import Row

REASON = "the package reasoning-gym is not installed (extra reasoning-gym)"
installed = pytest.mark.skipif(not ours.is_installed(), reason=REASON)
SUMS = "reasoning_gym:chain_sum?min_terms=2&max_terms=3&size=4&seed=1"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    ours._hints.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(DataError, match=r"pip install 'rlhf-lightning\[reasoning-gym\]'"):
        read_rows(SUMS)
    ours._hints.cache_clear()


@installed
def test_rows_are_those_of_the_package() -> None:
    import reasoning_gym

    task = reasoning_gym.create_dataset("chain_sum", min_terms=2, max_terms=3, size=4, seed=1)
    rows = read_rows(SUMS, "prompt")
    assert [(row.data["prompt"], row.data["answer"]) for row in rows] == [(e["question"], e["answer"]) for e in task]
    parameters = {"min_terms": 2, "max_terms": 3, "size": 4, "seed": 1}
    assert rows[3].data["reasoning_gym"] == {"task": "chain_sum", "index": 3, "parameters": parameters}
    assert rows[3].where == f"{SUMS}[3]"
    json.dumps([row.data for row in rows])  # they can be written to a file
    for index in (3, 0):
        assert ours.task_entry("chain_sum", parameters, index).entry == task[index]


@installed
def test_every_parameter_has_a_value() -> None:
    """Without a seed, rows would be random, and ranks and resumed runs would disagree."""
    first, again = (read_rows("reasoning_gym:leg_counting?size=3") for _ in range(2))
    assert [row.data for row in first] == [row.data for row in again]
    assert first[0].data["reasoning_gym"]["parameters"] == {"size": 3, "seed": 0}
    listed = read_rows('reasoning_gym:caesar_cipher?size=1&min_words=2&max_words=2&delimiter="."')
    assert len(listed[0].data["answer"].split()) == 2


@installed
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("chainsum", "no reasoning-gym task 'chainsum'. Did you mean chain_sum"),
        ("", "no reasoning-gym task ''. Tasks are ab, acre,"),
        ("chain_sum?min_term=2", "no parameter 'min_term'. Did you mean min_terms?"),
        (
            "chain_sum?min_terms=a",
            "of the reasoning-gym task 'chain_sum' is 'a'; it must be a whole number",
        ),
        ("chain_sum?min_terms=true", "is True; it must be a whole number"),
        ("chain_sum?seed=null", "is None; it must be a whole number"),
        ("chain_sum?allow_negation=1", "is 1; it must be true or false"),
        ("chain_sum?min_terms=2&min_terms=3", "'min_terms' is given twice"),
        ("chain_sum?min_terms=9", "refuses its parameters: max_terms must be >= min_terms"),
        ("chain_sum?size=0", "refuses its parameters: size must be positive"),
        ("spell_backward?data_file=/etc/hostname", "has no parameter 'data_file'"),
        ("composite", "give a list of tasks"),
        ("list_functions", "cannot be generated again"),
    ],
)
def test_unsuitable_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=r"reasoning.gym") as error:
        check_there(f"reasoning_gym:{source}")
    assert message in str(error.value)


@installed
def test_tasks_in_a_list_of_prompts_and_in_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows([SUMS, "What is reasoning_gym: a game?", "reasoning_gym:leg_counting?size=1"], "prompt")
    assert [bool(row.data.get("reasoning_gym")) for row in rows] == [True] * 4 + [False, True]
    assert is_here(SUMS)
    assert hashed_files(SUMS) == []
    check_data_record(tmp_path, {"train": SUMS})
    before = fingerprint(SUMS)
    monkeypatch.setattr("rlhf_lightning.data.reasoning_gym.package_version", lambda: "0.9")
    assert fingerprint(SUMS) != before
    with pytest.raises(Exception, match="has changed since the run"):
        check_data_record(tmp_path, {"train": SUMS})


@installed
def test_prompts(tmp_path: Path, base: str) -> None:
    data = PromptDataModule(SUMS, validation="reasoning_gym:chain_sum?size=2&seed=2", tokenizer=base)
    data.setup("fit")
    assert len(data.prepared["train"].rows) == 4
    assert len(data.prepared["validation"].rows) == 2


DIGESTS = """
import hashlib, json
from reasoning_gym.factory import DATASETS, create_dataset
found = {}
for name in sorted(DATASETS):
    if name != "composite":
        task = create_dataset(name, size=3, seed=1)
        entries = [task[i] for i in (0, 1, 2)]
        again = [create_dataset(name, size=3, seed=1)[i] for i in (2, 1)]
        digest = hashlib.sha256(repr([(e["question"], e["answer"]) for e in entries]).encode()).hexdigest()
        found[name] = digest if repr([entries[2], entries[1]]) == repr(again) else None
print("\\n" + json.dumps(found))
"""


@installed
@pytest.mark.slow  # 40 s: every task is generated in two processes
def test_what_questions_depend_on() -> None:
    """`HASH_DEPENDENT` has the tasks that differ between two hash seeds, `UNSUPPORTED` those that always differ."""
    seeds: list[Row] = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True, timeout=200
        )
        seeds.append(json.loads(out.stdout.splitlines()[-1]))  # some tasks print
    first, second = seeds
    assert {name for name in first if first[name] is None} == set(ours.UNSUPPORTED) - {"composite"}
    differ = {name for name in first if first[name] != second[name]}
    assert differ - set(ours.UNSUPPORTED) == ours.HASH_DEPENDENT


@installed
def test_tasks_that_depend_on_the_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours._task.cache_clear()
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(DataError, match="PYTHONHASHSEED=0"):
        check_there("reasoning_gym:ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(read_rows("reasoning_gym:ransom_note?size=2")) == 2
    ours._task.cache_clear()
