"""The work of every row: what is done with our model, and what with the one it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from undertow.bench import models
from undertow.bench.measure import Call, Steps, whole
from undertow.bench.models import Size
from undertow.decode import lean
from undertow.model import UndertowForCausalLM
from undertow.schedules import Cyclic, Interleaved, Jacobi, Schedule, Sequential
from undertow.stepper import Stepper, compiling


@dataclass(frozen=True)
class Work:
    """Two pieces of work to compare, whole or in steps.

    `note`: how true ours is; `holds`: whether that is within bounds (None: there are none).
    """

    ours: Call | Steps
    theirs: Call | Steps
    note: str = ""
    holds: bool | None = None


def backward(model: nn.Module, x: Tensor, **arguments) -> Call:
    """Forward and backward on a batch of which every token is predicted."""

    def step() -> None:
        model(input_ids=x, labels=x, **arguments).loss.backward()
        model.zero_grad()  # at the end: the next call's peak counts all the gradients that it makes

    return step


def update(model: nn.Module, x: Tensor) -> Call:
    """A training step: forward, backward, clipping and AdamW."""
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-3)

    def run() -> None:
        optimiser.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return run


# ---------------------------------------------------------------------- T2MLR: training

GATED = {"method": "T2MLR", "start": 2, "end": 5}
PUBLISHED = GATED | {"carry": "residual", "post_norm": True, "mixer_options": {"gain": 1e-2}}


@lru_cache(maxsize=1)
def strong(size: Size):
    """A trained model with open gates: `(model, batch, true memory, true gradients)`."""
    make = partial(models.recurrent, models.llama(size), time=GATED)
    model, x = models.trained(make, size, Cyclic(8, 3, adjoint=4), gates=1.0)
    with torch.no_grad():
        memory = model(x, schedule=Sequential()).memory
    return model, x, memory, models.gradients(model, x, Sequential())


def published_step(size: Size, recompute: bool = False) -> Work:
    """The published semantics on random weights: 17 passes, the last 5 live, cache residual.

    `recompute`: gradient checkpointing, ours alone.
    """
    model = models.recurrent(models.llama(size), time=PUBLISHED).train()
    if recompute:
        model.gradient_checkpointing_enable()
    x, schedule = models.ids(size), Jacobi(16, backward=4, start="unmixed")
    return Work(backward(model, x, schedule=schedule), backward(model.backbone, x, use_cache=False))


def faithful_step(size: Size, schedule: Schedule, memory: float, gradient: float) -> Work:
    """A schedule that stays within these errors of memory and gradient on trained weights with open gates."""
    model, x, true, gradients = strong(size)
    off = models.memory_error(model, x, schedule, true)
    found = models.gradients(model, x, schedule)
    bent = models.gradient_error(found, gradients)
    mixer = models.gradient_error(found, {n: g for n, g in gradients.items() if n.startswith("undertow.")})
    return Work(
        backward(model, x, schedule=schedule),
        backward(model.backbone, x, use_cache=False),
        f"memory {off:.1e}, gradient {bent:.1e} (mixer {mixer:.1e})",
        off <= memory and bent <= gradient,
    )


# ---------------------------------------------------------------------- LRT: training

RECURRENT = {"method": "LRT"}


def interleaved_step(size: Size, shared: bool) -> Work:
    """Two interleaved subsets against a backbone with the same tables."""
    model = models.recurrent(models.nanochat(size), time=RECURRENT | {"shared": shared}).train()
    baseline, x = models.recurrent(models.nanochat(size)).train(), models.ids(size)
    return Work(backward(model, x, schedule=Interleaved(2)), backward(baseline, x))


# ---------------------------------------------------------------------- depth: training


def reuse_step(size: Size, counts: tuple[int, ...]) -> Work:
    """A reuse map against a plain stack of as many layers as it evaluates."""
    x, deep = models.ids(size), Size(**{**vars(size), "layers": sum(counts)})
    model = models.recurrent(models.llama(size), depth={"method": "ReuseMap", "counts": counts})
    return Work(update(model, x), update(models.plain(models.llama(deep)), x))


def recursion_step(size: Size, insert: int | None) -> Work:
    """A tiny recursive block, 2 cycles of 4 inner rounds, against the GPT-2 it stands in."""
    x, method = models.ids(size), {"method": "TRMBlock", "insert": insert}
    model = models.recurrent(models.gpt2(size), depth=method)
    return Work(update(model, x), update(models.plain(models.gpt2(size)), x))


# ---------------------------------------------------------------------- decoding


def stepping(model: UndertowForCausalLM, x: Tensor) -> Call:
    """All tokens of a text, one `forward` each, with a cache."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        cache = None
        for t in range(x.shape[1]):
            cache = model(x[:, t : t + 1], cache=cache, use_cache=True).cache

    return run


def reading(model: UndertowForCausalLM, x: Tensor, compiled: bool = False) -> Steps:
    """All tokens of a text but the first, one a step of the decode loop, which is the same for every model."""
    model.eval()

    def steps() -> Iterable[Call]:
        with torch.no_grad():
            cache = model(x[:, :1], use_cache=True).past_key_values
        step = Stepper(model, cache, torch.ones_like(x[:, :1]), most=x.shape[1] - 1, compiled=compiled)
        run = torch.inference_mode()(step)
        return (partial(run, x[:, t : t + 1]) for t in range(1, x.shape[1]))

    return steps


def writing(model: UndertowForCausalLM, x: Tensor, new: int) -> Steps:
    """Greedy, `new` tokens after a prompt that is read beforehand: decoding alone, the same loop for every model."""
    with torch.no_grad():
        out = model.eval()(x, use_cache=True, logits_to_keep=1)
    cache, first_B1 = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def steps() -> Iterable[Call]:
        step, token_B1 = Stepper(model, cache, torch.full_like(first_B1, x.shape[1]), most=new), first_B1

        @torch.inference_mode()  # the cache stays as it is: only `release` would hand it the new tokens
        def run() -> None:
            nonlocal token_B1
            token_B1 = step(token_B1).argmax(-1, keepdim=True)

        return repeat(run, new)

    return steps


def greedy(model: Any, x: Tensor, new: int, compiled: bool = False) -> Call:
    """`generate`, greedy, exactly `new` tokens: our loop in our models, Hugging Face's in theirs."""
    model.eval()
    length = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None)
    custom = partial(lean, compiled=True) if compiled else None
    mask = torch.ones_like(x)
    return lambda: model.generate(x, attention_mask=mask, do_sample=False, custom_generate=custom, **length)


def lrt_decode(size: Size) -> Work:
    """A token with the memory against one without, shared maps, the same loop."""
    x = models.ids(size)
    model, baseline = models.recurrent(models.nanochat(size), time=RECURRENT), models.recurrent(models.nanochat(size))
    return Work(reading(model, x), reading(baseline, x))


def lrt_decode_compiled(size: Size) -> Work:
    """The same with compiled layers, whole texts at once."""
    x = models.ids(size)
    model, baseline = models.recurrent(models.nanochat(size), time=RECURRENT), models.recurrent(models.nanochat(size))
    ours, theirs = (compiling(True)(whole(reading(each, x, compiled=True))) for each in (model, baseline))
    return Work(ours, theirs)


def t2mlr_decode(size: Size) -> Work:
    """Tokens with the memory against tokens of the plain backbone, the same loop."""
    model, x = models.recurrent(models.llama(size), time=PUBLISHED), models.ids(size)
    return Work(writing(model, x, size.new), writing(models.recurrent(models.llama(size)), x, size.new))


def reuse_decode(size: Size, counts: tuple[int, ...]) -> Work:
    """Generation with a reuse map against Hugging Face's, cached, with as many layers as it evaluates."""
    x, deep = models.ids(size), Size(**{**vars(size), "layers": sum(counts)})
    model = models.recurrent(models.llama(size), depth={"method": "ReuseMap", "counts": counts})
    return Work(greedy(model, x, size.new), greedy(models.plain(models.llama(deep)), x, size.new))


def plain_decode(size: Size, compiled: bool = False) -> Work:
    """Generation without any recurrence: ours on a backbone, Hugging Face's on the same tensors."""
    model, x = models.recurrent(models.llama(size)), models.ids(size)
    return Work(greedy(model, x, size.new, compiled), greedy(model.backbone, x, size.new))


# ---------------------------------------------------------------------- exact scoring


def scoring(size: Size, config: Callable, method: dict, gates: float | None, schedule: Schedule, memory: float) -> Work:
    """The true recurrence over a whole text in parallel, against stepping through it with a cache."""
    short = Size(**{**vars(size), "batch": 2, "tokens": min(256, size.tokens)})
    make = partial(models.recurrent, config(size), time=method)
    model, _ = models.trained(make, short, Cyclic(8, 3, adjoint=4), gates)
    x = models.batch(size, torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        true = model(x, schedule=Sequential()).memory
    off = models.memory_error(model, x, schedule, true)
    score = torch.no_grad()(lambda: model(x, schedule=schedule, use_cache=False))
    return Work(score, stepping(model, x), f"memory {off:.1e}", off <= memory)
