"""Scaling: curves are the means of their seeds in the order of their budgets; a power law only where there is one."""

import json
import statistics

import numpy as np
import pytest

from undertow.analysis import scaling

RATIOS = (8, 1, 4, 2)


def row(curve, ratio, seed, bits, multiplier=1.0, **more):
    result = {
        "seed": seed,
        "effective_compute": ratio * multiplier,
        "training_flops": 1e9 * ratio * multiplier**1.1,
        "bits_true": bits,
        "bits_training": bits - 0.01,
    }
    swept = {"training.tokens_per_parameter": ratio, "seed": seed}
    return {"curve": curve, "state": "finished", "swept": swept, "result": result} | more


def law(compute, exponent):
    return 3.0 * compute**-exponent


@pytest.fixture
def rows():
    plain = [row("plain", r, s, law(r, 0.1) + 0.001 * (s - 1)) for r in RATIOS for s in (0, 1, 2)]
    deep = [row("deep", r, 0, law(2 * r, 0.2), 2.0) for r in RATIOS]
    return [*plain, *deep]


def test_points_are_means_over_seeds(rows):
    found = scaling.curves(rows)
    assert list(found) == ["plain", "deep"]
    for name, seeds in (("plain", 3), ("deep", 1)):
        assert [point["tokens_per_parameter"] for point in found[name]] == sorted(RATIOS)
        assert all(len(point["bits"]) == len(point["seeds"]) == seeds for point in found[name])
    point = found["plain"][1]
    assert point["mean"] == pytest.approx(law(2, 0.1)) and point["deviation"] == pytest.approx(0.001)
    assert point["deviation"] == pytest.approx(statistics.stdev(point["bits"]))
    assert found["deep"][0]["deviation"] is None and found["deep"][0]["effective_compute"] == 2.0
    assert scaling.curves(rows, "bits_training")["plain"][0]["mean"] == pytest.approx(law(1, 0.1) - 0.01)


def test_what_is_not_measured_is_left_out(rows):
    unfinished = row("plain", 16, 0, 1.0, state="failed")
    other = row("plain", 32, 0, 1.0) | {"swept": {"seed": 0}}
    task = row("plain", 64, 0, 1.0)
    del task["result"]["bits_true"]
    assert scaling.curves([*rows, unfinished, other, task]) == scaling.curves(rows)


def test_a_power_law_is_found_and_its_error_is_that_of_the_residuals(rows):
    points = scaling.curves(rows)["deep"]
    found = scaling.power_law(points, "effective_compute")
    assert found["exponent"] == pytest.approx(0.2) and found["scale"] == pytest.approx(3.0)
    assert found["standard_error"] < 1e-6 and found["worst"] < 1e-6 and (found["from"], found["to"]) == (2, 16)
    assert scaling.power_law(points[1:], "effective_compute") is None  # three points: one more than its numbers

    noise = np.random.default_rng(0).normal(0, 0.01, (2000, len(points)))
    drawn = [[p | {"mean": p["mean"] * np.exp(e)} for p, e in zip(points, row, strict=True)] for row in noise]
    fits = [scaling.power_law(one, "effective_compute") for one in drawn]
    spread = np.std([fit["exponent"] for fit in fits])
    assert np.sqrt(np.mean([fit["standard_error"] ** 2 for fit in fits])) == pytest.approx(spread, rel=0.1)


def test_the_plot_and_the_numbers(rows, tmp_path):
    found = scaling.draw(rows, tmp_path, "two models")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "scaling.json").read_text()) == found
    assert set(found) == {"bits_true", "bits_training"}
    assert set(found["bits_true"]["plain"]["power_law"]) == {"effective_compute", "training_flops"}
    (tmp_path / "early").mkdir()
    early = [one for one in rows if one["swept"]["training.tokens_per_parameter"] == 1]
    assert scaling.draw(early, tmp_path / "early") is None and not list((tmp_path / "early").iterdir())
