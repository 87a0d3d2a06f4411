"""Budgets: what tokens per parameter counts, how often a schedule evaluates a layer, and what a run says it cost."""

import pytest
import torch
from training_runs import trained

import undertow as ut
from models import build
from undertow.analysis import compare
from undertow.plan import NORM
from undertow.recipe import Recipe, RecipeError, Training
from undertow.training import budget, run


def nanochat(layers, time=None):
    width = 64 * layers
    config = ut.UndertowNanoChatConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=32768,
        value="every",
    )
    with torch.device("meta"):
        return ut.from_scratch(config, time=time)


@pytest.mark.parametrize(("layers", "said"), [(4, 11.5), (12, 110)])
def test_scaling_parameters_are_nanochats(layers, said):
    """Its own table (blocks and LM head) in millions; value tables and embedding, most of the model, are left out."""
    model = nanochat(layers)
    assert budget.scaling_parameters(model) / 1e6 == pytest.approx(said, rel=5e-3)
    assert sum(p.numel() for p in model.parameters()) > 3 * budget.scaling_parameters(model)
    width = 64 * layers
    maps = budget.scaling_parameters(nanochat(layers, ut.LRT())) - budget.scaling_parameters(model)
    assert 2 * width**2 <= maps < 2.5 * width**2  # the shared maps to keys and values, and rows of gates


@pytest.mark.parametrize("family", ["llama", "gpt2", "undertow_llama"])
def test_scaling_parameters_by_hand(family):
    """Every matrix of the layers, and the LM head; tied or not, learned positions or not."""
    model = build(family)
    layers = sum(p.numel() for layer in model.view.layers for p in layer.parameters() if p.ndim == 2)
    head = model.get_output_embeddings().weight.numel()
    assert budget.scaling_parameters(model) == layers + head
    again = build(family, ut.ReuseMap([2, 1, 1, 3]))
    assert budget.scaling_parameters(again) == layers + head  # the same weights, visited more often


CASES = [
    (None, None, None, 1.0),
    (None, ut.LRT(), ut.Interleaved(2), 2.0),
    (None, ut.LRT(), ut.Interleaved(4), 2.0),
    (None, ut.LRT(), ut.Jacobi(3), 4.0),
    (None, ut.LRT(), ut.Chunked(4), 1.0),
    (None, ut.LRT(), ut.Sequential(), 1.0),
    (None, ut.T2MLR(1, 2), ut.Jacobi(3), (4 + 3 * 2) / 4),  # of four layers, two are repeated
    (None, ut.T2MLR(1, 2), ut.Jacobi(2, sample=(1, 3)), (4 + 2 * 2) / 4),  # the mean of what is drawn
    (ut.ReuseMap([2, 1, 1, 2]), None, None, 6 / 4),
    (ut.BlockLoop(3), None, None, 3.0),
    (ut.BlockLoop(2), ut.LRT(), ut.Interleaved(2), 4.0),
]


@pytest.mark.parametrize(("depth", "time", "schedule", "expected"), CASES)
def test_the_multiplier_is_evaluations_over_layers(depth, time, schedule, expected):
    model = build("llama", depth, time)
    assert budget.token_compute_multiplier(model, 32, schedule) == pytest.approx(expected)
    if schedule is not None and not getattr(schedule, "sample", None):
        calls = []
        hooks = [
            layer.register_forward_hook(lambda m, args, out: calls.append(out[0].shape[:-1].numel()))
            for layer in model.view.layers
        ]
        with torch.no_grad():
            model(torch.randint(3, 43, (1, 32)), schedule=schedule)
        assert sum(calls) / 32 / len(hooks) == pytest.approx(expected)  # as counted in a real forward


def test_converge_is_counted_as_rounds():
    model = build("llama", None, ut.LRT())
    assert budget.token_compute_multiplier(model, 32, ut.Converge(G=4)) == budget.token_compute_multiplier(
        model, 32, ut.Cyclic(4, 3)
    )
    assert {step.block for step in model.program.steps} - {NORM} == set(range(4))


def test_tokens_per_parameter_end_training_to_the_nearest_step():
    for ratio, parameters in ((1, 10_000), (2.5, 10_000), (20, 777)):
        limits = Training(batch_size=4, accumulation=2, tokens_per_parameter=ratio)
        steps = budget.steps_for(limits, 10.0, 32, parameters=parameters)
        assert abs(steps * 8 * 32 - ratio * parameters) <= 8 * 32 / 2
        assert (
            abs(budget.steps_for(limits, 10.0, 32, 4, parameters) * 4 * 8 * 32 - ratio * parameters) <= 4 * 8 * 32 / 2
        )
    both = Training(batch_size=4, tokens_per_parameter=10, max_steps=3)
    assert budget.steps_for(both, 10.0, 32, parameters=10_000) == 3
    with pytest.raises(RecipeError, match="needs one of max_steps, max_tokens, max_flops, tokens_per_parameter"):
        budget.steps_for(Training(), 10.0, 32, parameters=1)


def test_a_run_says_what_it_cost(values, tmp_path):
    training = {k: v for k, v in values["training"].items() if k != "max_steps"} | {"tokens_per_parameter": 0.02}
    recipe = Recipe.parse(values | {"training": training, "evaluation": {"points": 0, "rows": 2, "new_tokens": 2}})
    result = trained(recipe, tmp_path / "run")
    model = run.load(tmp_path / "run", "cpu").model
    assert result["scaling_parameters"] == budget.scaling_parameters(model) < result["parameters"]
    assert result["tokens"] == result["steps"] * 4 * 32
    assert abs(result["tokens"] - 0.02 * result["scaling_parameters"]) <= 4 * 32 / 2
    assert result["tokens_per_parameter"] == result["tokens"] / result["scaling_parameters"]
    assert result["token_compute_multiplier"] == 2.0  # Cyclic(4, 1) over both layers
    assert result["effective_compute"] == 2.0 * result["tokens_per_parameter"]
    assert result["training_flops"] == result["steps"] * 4 * budget.flops_per_row(model, 32)


def test_what_is_counted_before_training_has_the_tasks_own_vocabulary(values):
    recipe = Recipe.parse(values | {"data": {"source": "S5()", "seq_len": 32}})
    head = budget.on_meta(recipe).get_output_embeddings().weight
    assert head.is_meta and len(head) == len(recipe.data.source.tokenizer()) < 384
    assert len(budget.on_meta(Recipe.parse(values)).get_output_embeddings().weight) == 384


def test_a_comparison_at_equal_tokens_per_parameter():
    backbone = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared = {"backbone": backbone, "data": {"seq_len": 32}, "training": {"batch_size": 4}, "models": [{"name": "a"}]}
    given = compare.parse(shared | {"budget": {"tokens_per_parameter": 2}}, "c")
    assert given.limit(1e6, 6400) == {"max_flops": 100 * 4 * 1e6}
    each = compare.parse(shared | {"budget": {"tokens_per_parameter": 2, "match": "tokens_per_parameter"}}, "c")
    assert each.limit(1e6, 6400) == {"tokens_per_parameter": 2}  # every model of its own parameters
    matched = compare.parse(shared | {"budget": {"steps": 100, "match": "tokens_per_parameter"}}, "c")
    assert matched.limit(1e6, 6400) == {"tokens_per_parameter": 100 * 4 * 32 / 6400}
