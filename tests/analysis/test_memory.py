"""What is said to be kept for a backward is what autograd keeps."""

import pytest
import torch

import undertow as ut
from commands import call
from models import CONFIGS, ids
from undertow.analysis import show
from undertow.analysis.counts import saved_bytes
from undertow.analysis.memory import kept_bytes
from undertow.recipe import load
from undertow.training.budget import on_meta

T = 20
SCHEDULES = (
    ut.Jacobi(0),
    ut.Jacobi(5, backward=2),
    ut.Cyclic(4, 2),
    ut.Converge(1e-2, G=4, adjoint=2),
    ut.Sequential(),
)


@pytest.mark.parametrize(
    "family, time",
    [
        ("llama", ut.T2MLR(1, 2)),
        ("gpt2", ut.LRT()),
        pytest.param("llama", ut.LRT(), marks=pytest.mark.slow),
        pytest.param("gpt2", ut.T2MLR(1, 2), marks=pytest.mark.slow),
    ],
    ids=["llama-t2mlr", "gpt2-lrt", "llama-lrt", "gpt2-t2mlr"],
)
def test_kept_is_what_autograd_keeps(family, time):
    torch.manual_seed(0)
    model, x = ut.from_scratch(CONFIGS[family](), time=time).train(), ids(1, T)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)  # beside which a memory is small: no adjoint falls back
    for schedule in SCHEDULES:
        real = saved_bytes(lambda s=schedule: model(x, labels=x, schedule=s, use_cache=False), model)
        said, whole = kept_bytes(model, T, schedule), schedule.adjoint is not None or isinstance(schedule, ut.Jacobi)
        assert said == real if whole else abs(said - real) < 0.02 * real, schedule


def test_rows_it_cannot_run_are_the_rows_it_can():
    """A model on the meta device has no weights to run; what it keeps depends on them in nothing."""
    with torch.device("meta"):
        meta = ut.from_scratch(CONFIGS["llama"](), time=ut.T2MLR(1, 2))
    model = ut.from_scratch(CONFIGS["llama"](), time=ut.T2MLR(1, 2))
    assert kept_bytes(meta, T, ut.Jacobi(2)) == kept_bytes(model, T, ut.Jacobi(2)) > kept_bytes(meta, T, ut.Jacobi(1))


def test_it_is_shown(capsys, tmp_path):
    """One number more for each schedule, that of the training schedule first."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "backbone: {family: llama, hidden_size: 8, num_hidden_layers: 2, num_attention_heads: 4}\n"
        "time: T2MLR(0, 1)\nschedule: Jacobi(2)\ndata: {source: stdlib, seq_len: 16, vocab_size: 300}\n"
    )
    status, said, _ = call(capsys, "show", recipe, "--memory")
    assert status == 0 and "kept" in said
    model = on_meta(load(recipe))
    assert f"{show.short(kept_bytes(model, 16, ut.Jacobi(2)))}B" in said
    assert [cost.kept for cost in show.costs(model, 16)] == [None] * 4
