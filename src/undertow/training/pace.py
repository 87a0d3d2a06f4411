"""How long a training step takes on this machine, for comparisons at equal wall-clock."""

from __future__ import annotations

import statistics
import time

import torch

from undertow.backbone.attention import attend
from undertow.data import collate
from undertow.recipe import Recipe
from undertow.training import optimisers
from undertow.training.precision import autocast, device_of
from undertow.training.run import build_model

WARM, TIMED = 2, 5  # steps that are not counted, and that are


def seconds_per_step(recipe: Recipe, data, device: str = "auto") -> float:
    """The median over a few optimiser steps of a fresh model of the recipe, on the first rows of its data.

    Forward, backward and the optimiser are timed; reading rows, logging, evaluating and saving are not.
    """
    settings, where = recipe.training, device_of(device)
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        model = build_model(recipe, data.tokenizer).to(where).train()
        attend(model, recipe.backbone.attn_implementation)
        if settings.checkpointing:
            model.gradient_checkpointing_enable()
        rows = settings.batch_size
        optimiser = optimisers.build(model, settings, rows * settings.accumulation * recipe.data.seq_len)
        batch = collate([data.train[i % len(data.train)] for i in range(rows)])
        batch = {name: value.to(where) for name, value in batch.items()}
        taken = []
        for _ in range(WARM + TIMED):
            began = time.perf_counter()
            for _ in range(settings.accumulation):
                with autocast(settings.precision, where):
                    loss = model(**batch, skip_logits=settings.skip_logits).loss / settings.accumulation
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[WARM:])
