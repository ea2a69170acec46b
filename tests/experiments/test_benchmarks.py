"""The benchmarks' bookkeeping, and each of them at a size that takes no time; figures are not judged here."""

import itertools
import json

import pytest

from experiments.benchmarks import (
    __main__,
    adam_on_stiefel,
    growth,
    many_problems,
    matrix_completion,
    timing,
    transport_of_fixed_rank,
)


class Clock:
    """A clock that moves only when work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        turns = itertools.cycle(seconds)

        def run():
            self.now += next(turns)

        return run


def test_compare_takes_the_ratio_of_each_round(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    found = timing.compare(clock.work(0.5), clock.work(1.0, 2.0, 1.0, 4.0), rounds=3)
    assert found.ours_ms == 500
    assert found.peer_ms == 2000
    assert (found.low, found.ratio, found.high) == (2.0, 4.0, 8.0)


def test_measure_is_the_median_of_a_call(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    assert timing.measure(clock.work(9.0, 1.0, 5.0, 2.0), rounds=3) == 2.0


def test_adam_at_a_small_size():
    rows = adam_on_stiefel.run(adam_on_stiefel.Settings(batches=(2, 3), rows=12, columns=3, rounds=2))
    assert [row["peer"] for row in rows] == ["geoopt Stiefel()", *["geoopt EuclideanStiefel"] * 2]
    assert all(row["ours_defect"] < 1e-5 for row in rows)


def test_transport_at_a_small_size():
    (row,) = transport_of_fixed_rank.run(
        transport_of_fixed_rank.Settings(rows=20, columns=15, rank=3, rounds=2)
    )
    assert row["relative_difference"] < 1e-12


def test_completion_at_a_small_size():
    problem = matrix_completion.Problem(40, 30, 2, 0.5, 1)
    rows = matrix_completion.run(matrix_completion.Settings(problems=(problem,)))
    assert len(rows) == 3
    assert all(row["ours_error"] < 1e-8 and row["peer_error"] < 1e-8 for row in rows)


def test_many_problems_at_a_small_size():
    rows = many_problems.run(many_problems.Settings(count=4, peer_count=2, rounds=1))
    assert len(rows) == 6
    assert all(row["items_over_the_tolerance"] == 0 for row in rows)
    assert all(
        row["largest_value_above_the_peer"] < 1e-6
        for row in rows
        if row["work"].startswith("4 problems: sphere")
    )


def test_growth_at_a_small_size(device):
    settings = growth.Settings(
        batch=(1, 2), rows=(16, 32), rank=(2, 4), middle=(2, 16, 2), rounds=1, device=device.type
    )
    limit, *rows = growth.run(settings)
    assert limit["gigabytes_per_second"] > 0
    assert {row["operation"] for row in rows} == set(growth.OPERATIONS)


def test_the_page_says_where_an_aim_was_missed():
    row = {
        "work": "w",
        "peer": "p",
        "ours_ms": 1.0,
        "peer_ms": 2.0,
        "ratio": 2.0,
        "low": 1.5,
        "high": 2.5,
        "aim": 3.0,
    }
    machine = {
        "date": "2026-01-01",
        "device": "CPU, one thread",
        "processor": "x",
        "versions": {"torch": "1"},
    }
    found = {
        "matrix_completion": {"machine": machine, "result": [row, {**row, "aim": 2.0}, {**row, "aim": None}]}
    }
    lines = [
        line for line in __main__.page(json.loads(json.dumps(found))).splitlines() if line.startswith("| w |")
    ]
    assert ["**missed**" in line for line in lines] == [True, False, False]
    assert ["2, met" in line for line in lines] == [False, True, False]


def test_an_unknown_benchmark_is_named():
    with pytest.raises(SystemExit, match="no benchmark is called nothing; there are: adam_on_stiefel"):
        __main__.main(["nothing"])
