"""Rows of a running batch: added, cancelled, and each with its own settings."""

from dataclasses import replace
from typing import Any

import pytest

from rlhf_lightning.generation.local_engine import BatchRow, LocalEngine, SlotBatch, Watch
from rlhf_lightning.generation.token_sampling import SamplingParams
from tests.helpers.models import build_model

PROMPTS = [(5, 6, 7), (9, 10, 11, 12, 13), (5, 6, 7), (40,), (9, 9)]


@pytest.fixture
def engine(tokenizer: Any) -> LocalEngine:
    # In float64, so that the number of rows does not change a token.
    return LocalEngine(build_model(tokenizer).double(), tokenizer.decode, slots=3)


def rows() -> list[BatchRow]:
    """Rows with different settings and lengths."""
    params = [
        SamplingParams(12),
        SamplingParams(5, temperature=0.0),
        SamplingParams(9, temperature=0.7, top_p=0.9),
        SamplingParams(12, stop_token_ids=tuple(range(0, 60, 2))),
        SamplingParams(7, min_tokens=3, stop_token_ids=tuple(range(0, 60, 2)), top_k=40),
    ]
    return [BatchRow(prompt, one, seed) for seed, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True))]


def test_rows_that_join_a_running_batch_are_sampled_as_alone(engine: LocalEngine) -> None:
    joined = rows()
    with engine.decoding(17) as in_slots:
        assert in_slots
        batch = SlotBatch(engine, eager=True)
        for row in joined:
            batch.add(row)
            batch.step()  # admitted at once while a slot is free
            batch.step()
        assert len(batch.row_of_slot) <= 3
        while batch.step():
            pass
    assert all(row.ended for row in joined)
    for row in joined:
        [alone] = engine.generate([row.prompt], row.params, [row.seed])
        assert row.completion.ids == alone.ids
        assert row.completion.logprobs == pytest.approx(alone.logprobs, abs=1e-9)


def test_cancelled_rows_leave_their_slots(engine: LocalEngine) -> None:
    first, second, third, *_ = [replace(row, params=SamplingParams(12)) for row in rows()]
    with engine.decoding(17):
        batch = SlotBatch(engine, eager=True)
        for row in (first, second, third):
            batch.add(row)
        batch.cancel(third)  # while it waits
        batch.step()
        batch.step()
        batch.cancel(first)  # while it is sampled
        batch.cancel(first)
        while batch.step():
            pass
    assert [len(row.completion.ids) for row in (first, second, third)] == [2, 12, 0]
    [alone] = engine.generate([second.prompt], second.params, [second.seed])
    assert second.completion.ids == alone.ids


def test_models_with_their_own_generate_report_tokens(tokenizer: Any) -> None:
    class Tokens(Watch):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, bool]] = []

        def on_token(self, row: int, token: int, ended: bool) -> None:
            self.seen.append((row, token, ended))

    engine = LocalEngine(build_model(tokenizer, architecture="bloom"), tokenizer.decode)
    engine.watch = watch = Tokens()
    found = engine.generate(PROMPTS, SamplingParams(4), list(range(5)))
    for number, completion in enumerate(found):
        own = [(token, ended) for row, token, ended in watch.seen if row == number]
        assert own == [(token, i == 3) for i, token in enumerate(completion.ids)]
