"""The page on a run past one machine says what formulas, counts and constants give, and those are right."""

import importlib.util
from pathlib import Path

import pytest
import torch

import undertow as ut
from undertow.analysis import cluster
from undertow.analysis.cluster import H100, Counted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmarks_cluster", ROOT / "benchmarks" / "cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_is_computed(script):
    page = script.PAGE.read_text()
    assert script.fill(page, script.read()) == page, "run python benchmarks/cluster.py"


def test_constants_on_the_page(script):
    page = script.PAGE.read_text()
    for said, value in (
        ("989 TFLOP/s", H100.flops / 1e12 == 989),
        ("80 GB at 3.35 TB/s", (H100.memory, H100.bandwidth) == (80e9, 3.35e12)),
        ("450 GB/s sent", H100.link == 450e9),
        ("50 GB/s a GPU", H100.network == 50e9),
        ("| a launch from Python | 5 µs |", H100.eager == 5e-6),
        ("| a launch in a CUDA graph | 1 µs |", H100.graph == 1e-6),
        ("| 0.4 | assumed |", H100.mfu == 0.4),
    ):
        assert said in page and value, said


def test_the_run_is_the_recipe(script):
    from undertow import recipe

    chosen = recipe.load(ROOT / "recipes" / "lrt" / "d20_interleaved.yaml")
    from undertow.training.budget import on_meta

    model, training = on_meta(chosen), chosen.training
    ours = script.on_meta(ut.LRT())
    assert [p.shape for p in model.parameters()] == [p.shape for p in ours.parameters()]
    assert model.config.to_dict()["backbone"] == ours.config.to_dict()["backbone"]
    assert (chosen.data.seq_len, training.tokens_per_parameter) == (script.T, script.RATIO)
    assert training.batch_size * training.accumulation * chosen.data.seq_len == script.STEP
    assert training.optimiser == "nanochat"


def test_counts_of_the_plain_backbone(script):
    """Counted anew on other depths: linear in the layers, but for the masks of windows, which are made once."""
    stored = script.read()["plain: Jacobi(K=0)"].at(3)
    fresh = cluster.count(script.config(), None, script.BASELINE, script.T, (2, 3)).at(3)
    assert fresh[0] == pytest.approx(stored[0], rel=0.005)
    assert fresh[1:] == pytest.approx(stored[1:], rel=0.02)


@pytest.mark.slow
def test_all_counts_are_today_s(script):
    fresh = script.counted()
    assert fresh.keys() == script.read().keys()
    for name, stored in script.read().items():
        assert fresh[name].at(script.LAYERS) == pytest.approx(stored.at(script.LAYERS), rel=0.01), name


# ---------------------------------------------------------------------- formulas


def tiny(time=None):
    config = ut.UndertowNanoChatConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
        value="every",
    )
    return config, ut.from_scratch(config, time=time)


def test_what_an_optimiser_step_really_allocates():
    """Weights, gradients and state against a step taken: `held` is to the byte but for step counters."""
    from undertow.recipe import Training
    from undertow.training import optimisers

    _, model = tiny(ut.LRT())
    kept = cluster.held(model)
    x = torch.randint(0, 50, (1, 16))
    model(x, labels=x).loss.backward()
    optimiser = optimisers.build(model, Training(optimiser="nanochat", max_steps=1), 16)
    optimiser.step()
    assert kept.weights == sum(p.nbytes for p in model.parameters())
    assert kept.gradients == sum(p.grad.nbytes for p in model.parameters())
    state = [
        v for s in optimiser.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.shape.numel() > 1
    ]
    scalars = sum(p.numel() == 1 for p in model.parameters())
    assert kept.optimiser == sum(v.nbytes for v in state) + 8 * scalars


def test_stages():
    _, model = tiny(ut.LRT())
    for schedule, expected in (
        (ut.Sequential(), (64, 64, 1)),
        (ut.Chunked(16), (4, 4, 16)),
        (ut.Interleaved(2), (3, 3, 32)),
        (ut.Jacobi(3, backward=1), (4, 2, 64)),
        (ut.Cyclic(8, 3, adjoint=4), (26, 5, 8)),
        (ut.Cyclic(8, 3, backward=1), (25, 8, 8)),
    ):
        assert cluster.stages(model, schedule, 64) == expected, schedule
    assert cluster.stages(tiny()[1], ut.Cyclic(8, 3), 64) == (1, 1, 64)


def test_a_plan_in_closed_form():
    from undertow.analysis.flops import training_flops

    _, model = tiny(ut.LRT())
    P, T, schedule = sum(p.numel() for p in model.parameters()), 64, ut.Interleaved(2)
    base = training_flops(tiny()[1], T) / T
    saved = 1e6
    found = cluster.plan(model, base, schedule, Counted((0, saved / 4), (10, 5), (20, 10)), H100, T, step=512 * T * 8)
    # 512 rows of 64 tokens at 1 MB a token: 64 MB a row, of which 72 GB hold 1124; a power of two that divides 512
    assert (found.batch, found.micro) == (512, 1)
    assert found.activations == 512 * T * saved
    assert found.launches == (30, 60)
    assert found.eager == pytest.approx(90 * 5e-6) and found.graph == pytest.approx(90 * 1e-6)
    assert found.ddp == 2 * 7 / 8 * 4 * P
    assert found.fsdp == 7 / 8 * (2 * P + 4 * P)
    layers = sum(p.numel() for layer in model.view.layers for p in layer.parameters())
    assert found.resharded == found.fsdp + 7 / 8 * 2 * layers * (3 + 3 - 1)
    flops = training_flops(model, T, schedule) / T
    assert found.flops == flops and found.relative == flops / base
    assert found.compute == pytest.approx(flops * 512 * T / (0.4 * 989e12))
    assert found.tokens == pytest.approx(512 * T * 8 / (max(found.compute, found.eager) + found.ddp / 450e9))
    half = cluster.plan(model, base, schedule, Counted((0, saved / 2), (10, 5), (20, 10)), H100, T, step=1024 * T * 8)
    assert (half.batch, half.micro) == (512, 2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [ut.Interleaved(2), ut.Cyclic(4, 2, adjoint=2)], ids=["interleaved", "adjoint"])
def test_launches_are_linear_in_the_layers(schedule):
    """So that twins of 4 and 8 layers say what 12 do."""
    config, _ = tiny()
    short, long = (cluster.count(config, ut.LRT(), schedule, 32, depths, short=16) for depths in ((4, 8), (8, 12)))
    assert short.at(12) == pytest.approx(long.at(12), rel=1e-9)
