"""The benchmark of rounds sampled ahead, at its smallest size."""

import json
import statistics

from benchmarks import async_rounds
from tests.helpers.docs import ROOT


def test_lengths_have_a_long_tail() -> None:
    lengths = [async_rounds.response_length(seed) for seed in range(2000)]
    assert lengths == [async_rounds.response_length(seed) for seed in range(2000)]
    assert abs(statistics.median(lengths) - async_rounds.MEDIAN) < 6
    longest = [max(lengths[i : i + 16]) for i in range(0, 2000, 16)]
    assert statistics.fmean(longest) > 3 * async_rounds.MEDIAN
    assert max(lengths) == async_rounds.MOST


def test_smallest_run() -> None:
    server = async_rounds.SimulatedServer(1e-4)
    clock = async_rounds.run(1, 3, server)
    server.close()
    assert server.process.returncode == 0
    assert clock.ages == [0.0, 1.0, 1.0]
    assert len(clock.times) == 4
    # The longest of 16 responses.
    assert all(seconds > 60 * 1e-4 for seconds in server.sampled)
    assert len(server.sampled) == 3
    assert async_rounds.per_round(clock) == (clock.times[3] - clock.times[0]) / 3


def test_page_has_the_tables_of_the_committed_results() -> None:
    result = json.loads(async_rounds.RESULTS.read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for part in async_rounds.report(result).split("\n\n"):
        assert part in page, "copy what the script prints"
