"""The demo's promises on models trained by its own recipe, in small: `make demo` itself is this, longer."""

import json
from pathlib import Path

import pytest
import torch

import undertow as ut
from undertow.analysis import check, compare
from undertow.training import run as runs

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    plan = compare.load([RECIPE], ["budget.steps=30", "evaluation.points=2", "data.validation_rows=8"])
    return folder, compare.run(plan, folder, device="cpu")


@pytest.mark.slow
def test_the_demo_compares_five_models_at_equal_flops(demo):
    folder, results = demo
    found = [result for (result,) in results.values()]
    assert len(found) == 5 and not any("failed" in result for result in found)
    flops = [result["training_flops"] for result in found]
    assert max(flops) / min(flops) < 1.1  # whole steps: at 30 of them the rounding is a few percent
    for result in found:
        assert 0 < result["bits_true"] < 4 and result["generation_tokens_per_second"] > 0 and result["samples"]
    assert {p.name for p in folder.iterdir()} >= {"table.md", "table.json", "curves.png", "curves.json", "samples.md"}
    curves = json.loads((folder / "curves.json").read_text())["models"]
    assert all(len(points) == 2 for (points,) in curves.values())


@pytest.mark.slow
@torch.no_grad()
def test_sweeps_find_the_true_recurrence_of_the_trained_model(demo):
    """`Converge(1e-6)` is `Sequential` to 1e-4 in logits; `Cyclic(16, 3)` is ten times closer than `Jacobi(3)`."""
    folder, _ = demo
    loaded = runs.load(folder / "T2MLR", "cpu")
    x = torch.stack([torch.as_tensor(runs.open_data(loaded.recipe).validation[i]["input_ids"]) for i in range(3)])
    model = loaded.model
    true = model(x, schedule=ut.Sequential())
    solved = model(x, schedule=ut.Converge(1e-6))
    assert (solved.logits - true.logits).abs().max() < 1e-4
    assert solved.passes < 17  # of the 256 that stepping through takes

    def distance(schedule):
        out = model(x, schedule=schedule)
        assert out.passes == pytest.approx(4)
        return float((out.memory - true.memory).norm() / true.memory.norm())

    assert distance(ut.Cyclic(16, 3)) < distance(ut.Jacobi(3)) / 10


@pytest.mark.slow
def test_check_finds_nothing_broken_in_any_demo_model(demo):
    folder, results = demo
    for name in results:
        report = check.run(folder / name, device="cpu")
        assert report.ok, (name, str(report))
