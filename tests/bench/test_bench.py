"""Every row of the benchmark runs at a tiny size and reports. What it finds there means nothing, so no time is held."""

import json

import pytest
import torch

from commands import call
from undertow.bench import measure, models, work
from undertow.bench.models import Size
from undertow.bench.rows import ROWS, run

TINY = Size(layers=6, width=32, mlp=48, heads=2, vocabulary=300, batch=2, tokens=10, steps=1)
BOUNDED = {
    "t2mlr-adjoint",
    "memory-adjoint",
    "t2mlr-exact",
    "t2mlr-fast",
    "memory-exact",
    "memory-fast",
    "score-t2mlr",
    "score-lrt",
}


@pytest.fixture(autouse=True, scope="module")
def few_letters():
    """Text without reading the standard library."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(256, (2000,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "text", lambda: letters)
        yield
    work.strong.cache_clear()


@pytest.mark.parametrize("row", [r for r in ROWS.values() if not r.slow], ids=lambda row: row.name)
def test_every_row_runs(row):
    result = run(row, rounds=1, tiny=True)
    assert result.ratio.low <= result.ratio.median <= result.ratio.high
    assert result.ratio.low > 0 and result.met is None
    assert bool(result.note) == (row.name in BOUNDED)


def test_the_table_and_its_file(capsys, tmp_path):
    path = tmp_path / "new" / "bench.json"
    status, said, _ = call(capsys, "bench", "reuse-step", "plain-decode", "--tiny", "--rounds", 2, "--out", path)
    assert status == 0 and "reuse-step" in said and "<= 1.0" in said and ">= 1.2" in said
    found = json.loads(path.read_text())
    assert [row["row"] for row in found["rows"]] == ["reuse-step", "plain-decode"]
    assert found["tiny"] and found["threads"] == 1 and found["rows"][0]["rounds"] == 2
    assert found["rows"][0]["met"] is None and found["rows"][0]["size"]["width"] == 32


def test_all_rows_are_listed(capsys):
    status, said, _ = call(capsys, "bench", "--list")
    assert status == 0
    assert all((row.name in said) != row.slow for row in ROWS.values())


def test_a_row_that_does_not_exist(capsys):
    status, _, said = call(capsys, "bench", "nothing")
    assert status == 2 and said.count("\n") == 1 and "'nothing'" in said and "lrt-decode-compiled" in said


def test_a_ratio_is_the_median_of_paired_rounds(monkeypatch):
    clock = iter([0, 9, 0, 1, 0, 2, 0, 1, 0, 6, 0, 2, 0, 4, 0, 1])  # seconds of ours and theirs in turn; 9 warms up
    monkeypatch.setattr(measure.time, "process_time", lambda: next(clock))
    ratio = measure.times(lambda: None, lambda: None, rounds=3)
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (3, 2, 4, 3)


def test_more_is_better_where_speed_is_compared():
    assert ROWS["ilr-decode"].met(1.1) and not ROWS["ilr-decode"].met(0.9)
    assert ROWS["trm-a"].met(1.8) and not ROWS["trm-a"].met(2.0)


def test_memory_is_the_peak_of_what_is_allocated():
    def peak(*megabytes):
        def hold():
            kept = [torch.zeros(250_000 * n) for n in megabytes]
            del kept
            torch.zeros(250_000)

        return hold

    assert measure.memory(peak(3, 4), peak(1), rounds=1).median == pytest.approx(7, rel=0.01)


def test_fidelity_is_measured_against_the_definition():
    """Token by token nothing is off; without rounds much is, and a row with bounds says that it does not hold."""
    model, x, memory, gradients = work.strong(TINY)
    assert models.memory_error(model, x, work.Sequential(), memory) < 1e-6
    assert models.gradient_error(models.gradients(model, x, work.Sequential()), gradients) < 1e-5
    assert models.memory_error(model, x, work.Jacobi(0), memory) > 1e-4
    assert work.faithful_step(TINY, work.Cyclic(4, 4), memory=1e-3, gradient=1e-3).holds
    assert not work.faithful_step(TINY, work.Jacobi(0), memory=1e-6, gradient=1e-6).holds
