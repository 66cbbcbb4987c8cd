"""The benchmark of masks from end to end in its smallest setting, and the clockwork below it."""

import json
import math

import pytest

from experiments.benchmarks import masks
from experiments.harness.timing import Goal, compare, timing_table


class FakeClock:
    """A clock that moves only when a fake piece of work says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, *durations):
        """A call that lasts each of the durations in turn, the last one for ever."""
        left = list(durations)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def timed(functions, clock, **options):
    return compare(functions, clock=clock, cpu_clock=clock, **options)


def test_the_small_preset_runs_and_writes_every_row(tmp_path, capsys):
    masks.main(["--preset", "test", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmarks" / "masks.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 20
    for row in rows.values():
        figures = [row["ratio"], row["cpu_ratio"], row["median_ms"], row["cpu_ms"]]
        assert all(math.isfinite(x) and x > 0 for x in [*figures, *row["quartiles_ms"]]), row
        assert row["baseline"] in rows
        assert (row["goal"] is None) == (row["met"] is None)
    assert sum(row["goal"] is not None for row in rows.values()) == 10
    assert {"python", "jax", "optax"} <= set(report["versions"])
    assert "cpu" in report["device"]
    shown = capsys.readouterr().out
    assert "goals met" in shown
    assert "AdamS" in shown


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        masks.main(["--preset", "test", "--out", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_ratio_is_that_of_the_medians():
    clock = FakeClock()
    # three calls to warm up, then rounds of which one is disturbed
    slow = clock.work(9.0, 3.0, 3.0, 3.0, 3.0, 50.0, 3.0, 3.0)
    found = timed({"fast": clock.work(2.0), "slow": slow}, clock, baseline="fast", rounds=5)
    assert found["slow"].ratio == pytest.approx(1.5)
    assert found["slow"].cpu_ratio == pytest.approx(1.5)
    assert found["fast"].ratio == 1
    assert found["slow"].median == pytest.approx(3.0)
    assert found["slow"].quartiles == pytest.approx((3.0, 3.0))
    assert found["slow"].calls == 1


def test_short_calls_are_repeated_within_a_measurement():
    clock = FakeClock()
    functions = {"a": clock.work(2**-13), "b": clock.work(2**-12)}
    found = timed(functions, clock, baseline="a", rounds=3, min_seconds=2**-6)
    assert (found["a"].calls, found["b"].calls) == (128, 64)
    assert found["b"].ratio == pytest.approx(2)
    assert len(found["b"].wall) == 3


def test_goals_are_judged_by_the_run():
    clock = FakeClock()
    functions = {"base": clock.work(1.0), "near": clock.work(1.2), "quick": clock.work(0.01)}
    found = timed(functions, clock, baseline="base", rounds=1)
    goals = {"near": Goal(1.1), "quick": Goal(1 / 50)}
    table, rows = timing_table("title", list(found.values()), goals)
    assert table.row_count == 3
    assert [row["met"] for row in rows] == [None, False, True]
    assert [row["goal"] for row in rows] == [None, "<= 1.1", "<= 1/50"]


def test_compare_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="baseline is 'b'; it must be one of a"):
        compare({"a": lambda: None}, baseline="b")
    with pytest.raises(ValueError, match="rounds is 0"):
        compare({"a": lambda: None}, baseline="a", rounds=0)
