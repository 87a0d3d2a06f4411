"""Depth sets everything: the published tables, and batches that divide."""

import dataclasses
import math

import pytest

from undertow.recipe import Recipe
from undertow.training.depth import LRT_RELEASE, NANOCHAT, DepthRule, accumulation, scaling_parameters

# nanochat's own sizes at a vocabulary of 32,768: layers, width, scaling parameters (millions), tokens (billions),
# log2 of the batch, steps, learning rate, weight decay
TABLE = [
    (4, 256, 11.5, 0.14, 18, 528, 0.71, 1.89),
    (6, 384, 23.2, 0.28, 18, 1062, 0.71, 0.94),
    (12, 768, 110, 1.32, 19, 2520, 1.0, 0.28),
    (20, 1280, 435, 5.2, 20, 4980, 1.41, 0.100),
    (24, 1536, 730, 8.8, 20, 8352, 1.41, 0.060),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"L={row[0]}")
def test_nanochat_table(row):
    layers, width, scaling, tokens, batch, steps, rate, decay = row
    sizes = NANOCHAT(layers)
    assert (sizes.layers, sizes.width, sizes.heads) == (layers, width, width // 128)
    assert (sizes.batch_tokens, sizes.steps) == (2**batch, steps)
    assert sizes.tokens / 1e9 == pytest.approx(tokens, abs=0.05)
    assert (round(sizes.learning_rate, 2), round(sizes.weight_decay, 2)) == (rate, round(decay, 2))
    assert scaling_parameters(layers, 32768) / 1e6 == pytest.approx(scaling, rel=0.005)
    given = NANOCHAT(layers, scaling=round(scaling * 1e6))
    assert given.batch_tokens == 2**batch and given.steps == pytest.approx(steps, rel=0.005)
    assert given.weight_decay == pytest.approx(decay, rel=0.01)


@pytest.mark.parametrize("layers", [5, 12, 20, 24])
def test_lrt_release(layers):
    sizes = LRT_RELEASE(layers)
    width = 64 * layers + (64 if layers % 2 else 0)
    parameters = 12 * width**2 * layers + 32768 * width
    assert (sizes.width, sizes.heads) == (width, width // 128)
    assert (sizes.batch_tokens, sizes.learning_rate, sizes.tokens) == (524288, 1.0, 12 * parameters)
    assert sizes.weight_decay == pytest.approx(0.2 * (12 / layers) ** 2)


def test_ratio_and_errors():
    half = dataclasses.replace(NANOCHAT, ratio=6.0)(12)
    assert half.tokens == NANOCHAT(12).tokens / 2
    assert (half.batch_tokens, half.weight_decay) == (2**19, 0.28), "12 layers are the anchor at any ratio"
    for layers in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"layers={layers}: must be a whole number"):
            DepthRule()(layers)


def test_a_batch_is_whole_micro_batches():
    """A published default divided by the number of GPUs and came to 0 micro-batches."""
    assert accumulation(2**18, 512, 16) == 32 and accumulation(2**18, 512, 16, processes=8) == 4
    for processes in (3, 64):
        with pytest.raises(ValueError, match=r"batch_tokens=262144: must be a multiple of \d+ .*processes") as caught:
            accumulation(2**18, 512, 16, processes)
        assert "\n" not in str(caught.value)


def test_sizes_make_a_recipe():
    values = NANOCHAT(4).recipe(seq_len=512, batch_size=16)
    backbone = {"family": "llama", "max_position_embeddings": 512, **values["backbone"]}
    recipe = Recipe.parse({"backbone": backbone, "data": {"seq_len": 512}, "training": values["training"]})
    training = recipe.training
    assert training.batch_size * training.accumulation * recipe.data.seq_len == 2**18
    assert training.max_steps == 528 and training.optimiser == "nanochat"
    assert math.isclose(training.weight_decay, NANOCHAT(4).weight_decay)
