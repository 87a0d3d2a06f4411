"""What a model costs: FLOPs of training, prefill and decoding, layer evaluations, bytes of the cache. All by formula.

A FLOP count here is that of the matrix products a call executes, `2 m n k` each and nothing else: what torch's
`FlopCounterMode` counts under the math attention backend. Attention is counted dense, over all keys that a sweep's
queries are given, masked or not: the whole buffer for strided subsets, up to the block's end for contiguous blocks,
past and present in cached calls. A kernel that skips masked keys saves up to half of that part. CoPE's product of
queries and table is attention's; FIRE's MLP, which sees every distance once a call, is left out.

`analysis.walk` repeats the executor's walk without tensors.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from undertow.analysis.walk import Walk
from undertow.analysis.weights import block_of
from undertow.model import UndertowForCausalLM
from undertow.schedules import Converge, Jacobi, Schedule, Sequential

ROUNDS = 3  # in which Converge is taken to converge where a cost must be stated: what it takes depends on the data

__all__ = ["decode_flops", "forward_flops", "kv_bytes", "layer_evaluations", "prefill_flops", "training_flops"]


def layer_evaluations(model: UndertowForCausalLM, T: int = 1, schedule: Schedule | None = None) -> float:
    """Blocks (layers and extra blocks, not norms) that one forward runs per token; a sweep counts by its positions.

    `schedule=None` counts every visit once: the cost of a token in decoding. Others and errors as `forward_flops`.
    """
    return Walk(model, T, schedule or Sequential()).evaluations


def forward_flops(
    model: UndertowForCausalLM, T: int, schedule: Schedule | None = None, batch: int = 1, labels: bool = False
) -> float:
    """FLOPs of `model(input_ids_BT)` without gradient.

    Args:
        T: tokens a row; `batch`: rows.
        schedule: None is evaluation's, `Converge()`, which has a cost only on models without a delay-1 edge, where
            all schedules are one sweep. On others give `Cyclic(G, n)`: n is `out.passes` less one.
        labels: a loss is asked for, so the LM head runs on every read-out and not on the merged states.

    Raises:
        ValueError: T below 1, or a schedule whose cost depends on the data.
    """
    return batch * Walk(model, T, schedule or Converge(), heads=None if labels else T, batch=batch).forward


def training_flops(model: UndertowForCausalLM, T: int, schedule: Schedule | None = None, batch: int = 1) -> float:
    """FLOPs of `model(input_ids_BT, labels=...).loss.backward()`, without the optimiser's step.

    Parameters that need no gradient cost none, nor do sweeps and rounds without gradient. Gradient checkpointing adds
    the forward of a visit to every backward through it (an upper bound: torch stops a recomputation early).
    `schedule=None` is the model's own for training; others and errors as `forward_flops`. Where a schedule draws its
    depth, the mean over what it draws from.
    """
    schedule = schedule or model.schedule
    if isinstance(schedule, Jacobi) and schedule.sample:
        depths = [replace(schedule, K=k, sample=None) for k in schedule.sample]
        return sum(training_flops(model, T, fixed, batch) for fixed in depths) / len(depths)
    walk = Walk(model, T, schedule or model.schedule, grad=True, batch=batch)
    return batch * (walk.forward + walk.products + walk.backward(walk.losses))


def prefill_flops(model: UndertowForCausalLM, T: int, schedule: Schedule | None = None) -> float:
    """FLOPs of a generation's first call: a forward of T tokens, logits for the last. Rest as `forward_flops`."""
    return Walk(model, T, schedule or Converge(), heads=1).forward


def decode_flops(model: UndertowForCausalLM, context: int) -> float:
    """FLOPs of one new token after `context` cached ones. Raises ValueError for a context below 0."""
    return Walk(model, 1, Sequential(), heads=1, past=context).forward


def kv_bytes(model: UndertowForCausalLM, context: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of keys, values and memory in the cache of one sequence of `context` tokens (`dtype=None`: the model's)."""
    owners = {step.slot: step.block for step in reversed(model.program.steps)}
    numbers = 2 * context * sum(block_of(model, owners[slot]).kv_width for slot in model.program.slots)
    return (numbers + len(model.program.memories) * model.view.shape.width) * (dtype or model.dtype).itemsize
