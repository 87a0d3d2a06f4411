"""What a step costs and how many steps a budget buys. The one place that asks `analysis.flops`.

Two measures of the compute of a training run stand side by side. `training_flops` is exact for what is executed.
*Effective compute* is how the LRT paper puts models on one axis: tokens per parameter times the token-compute
multiplier of the schedule. It leaves out what mixers and projections of the memory cost, masked attention, the
backward's own share (cut gradients, the adjoint's products) and that models differ in size.
"""

from __future__ import annotations

import dataclasses
import warnings

from torch import nn

from undertow import plan
from undertow.analysis import label
from undertow.recipe import Recipe, RecipeError, Training
from undertow.schedules import Converge, Cyclic, Jacobi, Schedule


def flops_per_row(model, seq_len: int, schedule: Schedule | None = None) -> float:
    """Training FLOPs (forward and backward) of one row of `seq_len` tokens; None is the model's training schedule.

    `Converge` costs what the data need, so where there is a memory it is counted as `ROUNDS` cyclic rounds, with a
    warning.
    """
    from undertow.analysis.flops import training_flops

    schedule = model.schedule if schedule is None else schedule
    counted = _countable(model, schedule)
    if counted is not schedule:
        warnings.warn(
            f"{label(schedule)} costs what the data need; FLOPs are counted as of {label(counted)}", stacklevel=2
        )
    return float(training_flops(model, seq_len, counted))


def token_compute_multiplier(model, seq_len: int, schedule: Schedule | None = None) -> float:
    """Evaluations of a block per token of training, over the number of blocks: how often a weight meets a token.

    1 for a plain model, 2 under Interleaved, K + 1 under Jacobi(K) over all layers (less where the span is part of
    them); a layer visited twice counts twice. Blocks count alike whatever their size, forward passes only.

    Args:
        schedule: None is the model's training schedule; `Converge` is counted as in `flops_per_row`.
    """
    from undertow.analysis.flops import layer_evaluations

    schedule = _countable(model, model.schedule if schedule is None else schedule)
    each: list[Schedule] = [schedule]
    if isinstance(schedule, Jacobi) and schedule.sample:
        each = [dataclasses.replace(schedule, K=k, sample=None) for k in schedule.sample]
    blocks = {step.block for step in model.program.steps} - {plan.NORM}
    return sum(layer_evaluations(model, seq_len, one) for one in each) / len(each) / len(blocks)


def _countable(model, schedule: Schedule) -> Schedule:
    """The schedule whose cost stands for that of `schedule`: another one only where that depends on the data."""
    from undertow.analysis.flops import ROUNDS

    if isinstance(schedule, Converge) and model.program.memories:
        return Cyclic(schedule.G, ROUNDS, adjoint=schedule.adjoint)
    return schedule


def scaling_parameters(model) -> int:
    """The parameters that `tokens_per_parameter` counts: numbers in matrices that a token is multiplied by.

    Those of layers, extra blocks, mixers and projections of the memory, each once however often it is visited, and
    the LM head (also where it is the embedding table). Left out are tables that are looked up (embeddings, positions,
    value embeddings), and vectors. For a nanochat-style model this is nanochat's and LRT's count: block matrices, LM
    head, memory maps. So at the same ratio a model with maps of its own gets more tokens than its baseline.
    """
    head = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(head)}
    return sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in tables)


def steps_for(
    limits: Training, flops_row: float, seq_len: int, processes: int = 1, parameters: int | None = None
) -> int:
    """Optimiser steps until the first limit of the recipe is reached, rounded to the nearest, at least 1.

    Args:
        limits: at least one of its `max_steps`, `max_tokens`, `max_flops` and `tokens_per_parameter` must be given.
        flops_row: training FLOPs of one row.
        seq_len: tokens of one row.
        processes: how many train in parallel.
        parameters: `scaling_parameters` of the model; needed for `tokens_per_parameter` only.

    Raises:
        RecipeError: no limit.
    """
    rows = limits.batch_size * limits.accumulation * processes  # of one step
    bought = []
    if limits.max_steps is not None:
        bought.append(limits.max_steps)
    if limits.max_tokens is not None:
        bought.append(round(limits.max_tokens / (rows * seq_len)))
    if limits.max_flops is not None:
        bought.append(round(limits.max_flops / (rows * flops_row)))
    if limits.tokens_per_parameter is not None:
        assert parameters is not None, "tokens_per_parameter needs the model's scaling_parameters"
        bought.append(round(limits.tokens_per_parameter * parameters / (rows * seq_len)))
    if not bought:
        raise RecipeError("training: needs one of max_steps, max_tokens, max_flops, tokens_per_parameter")
    return max(1, min(bought))


def evaluations_per_token(model) -> float:
    """Layer evaluations that one new token costs in generation: one a visit."""
    from undertow.analysis.flops import layer_evaluations

    return layer_evaluations(model)


def on_meta(recipe: Recipe):
    """The model of a recipe without weights, to be counted: its data are not opened, no weights are read.

    Its vocabulary is `backbone.vocab_size`, else that of `data.tokenizer`, else of the task's own tokenizer, else
    `data.vocab_size` (a tokenizer that is trained may have fewer).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from undertow.backbone.pretrained import pretrained_config
    from undertow.data import load_tokenizer
    from undertow.model import wrap
    from undertow.tasks import Task
    from undertow.training.run import build_model

    base, data = recipe.backbone, recipe.data
    tokenizer = data.source.tokenizer() if isinstance(data.source, Task) else None
    if data.tokenizer is not None and "vocab_size" not in (base.model_extra or {}) and base.pretrained is None:
        tokenizer = load_tokenizer(data.tokenizer)
    with torch.random.fork_rng([]), torch.device("meta"):
        if base.pretrained is None:
            return build_model(recipe, tokenizer)
        lm = AutoModelForCausalLM.from_config(pretrained_config(base.pretrained, base.revision))
        future = None if recipe.future is None else recipe.future.model_dump()
        return wrap(lm, recipe.depth, recipe.time, recipe.schedule, future)
