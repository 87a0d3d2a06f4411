"""The latent gap: how far what a schedule trains is from the recurrence that is decoded.

Loss, memory and gradient of the training schedule against those of `Sequential`, on a text and with the weights as they
are; over all, by position, and sweep by sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from undertow.analysis import Check, label
from undertow.analysis.lens import sweeps
from undertow.model import UndertowForCausalLM
from undertow.schedules import Converge, Cyclic, Schedule, Sequential, Sweep

__all__ = ["measured"]

# Two ways of computing the same logits, largest difference over largest logit. Measured in float32: rounding 1e-6, the
# faults of the tests 3e-4 (through a gate that is open by 0.7 %) to 1; 1e-4 lies between. Measured in bfloat16: 2e-2.
# In float64 1e-9, but Hugging Face's RMSNorm and rotary embedding work in float32 inside: 1e-5 where they are used.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SINGLE_INSIDE = 1e-5
FLOOR = {torch.float64: 1e-11, torch.float32: 3e-6}  # a relative change of the memory that is only rounding; half: 2e-2
SAFE = 0.9  # the contraction rate below which a handful of adjoint products is enough
SUBSETS, ROUNDS = (8, 16), 4  # of the cyclic schedules that are tried
GOALS = (1e-3, 1e-5)  # memory distances for which a schedule is advised
ENOUGH = 0.05  # what the adjoint may leave out of the gradient
PARTS = 4  # of a text, one after the other, that are told apart
SWEEPS = 6  # at most so many passes are told, the first and the last of them


def measured(model: UndertowForCausalLM, text: dict[str, Tensor]) -> list[Check]:
    """`gap`, `position`, `sweep`, `contraction`, `schedule`, `gradient` and `exact` of a model with a memory.

    Args:
        text: the arguments of a forward and `labels`, each `_BT`; pads are where `attention_mask` is 0.
    """
    labels = text["labels"]
    forward = {name: value for name, value in text.items() if name != "labels"}
    real = forward["attention_mask"].bool() if "attention_mask" in forward else torch.ones_like(labels).bool()
    with torch.no_grad():
        true = model(**forward, schedule=Sequential(), use_cache=False)

        def distance(schedule: Schedule) -> tuple[float, float]:
            far_BT = _distance(model(**forward, schedule=schedule, use_cache=False).memory, true.memory)[real]
            return float(far_BT.mean()), float(far_BT.max())

        out = model(**forward, schedule=model.schedule, use_cache=False)
        shrinks = contraction(model, forward)
        return [
            gap(model, out, true, labels, real),
            by_position(out, true, labels, real),
            by_sweep(model, forward, true, labels, real),
            shrinks,
            advice(distance, labels.shape[1], shrinks.values["rate"]),
            gradient(model, text),
            exact(model, forward, true),
        ]


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def tolerance(model: UndertowForCausalLM) -> float:
    single_inside = model.dtype == torch.float64 and model.view.family.rotary is not None
    return SINGLE_INSIDE if single_inside else TOLERANCE[model.dtype]


def _distance(memory: Tensor, true: Tensor) -> Tensor:
    """`|M - M_true| / |M_true|`, `_BT`."""
    memory, true = memory.flatten(2).to(_wide(memory)), true.flatten(2).to(_wide(true))
    return (memory - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-8)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the token that follows each, `_BT`; NaN where none does or it has no label."""
    scores, after = logits[:, :-1].to(_wide(logits)), labels[:, 1:]
    nats = F.cross_entropy(scores.transpose(1, 2), after, ignore_index=-100, reduction="none")
    return F.pad(nats.masked_fill(after == -100, math.nan), (0, 1), value=math.nan)


def gap(model, out, true, labels: Tensor, real: Tensor) -> Check:
    """Loss and memory under the training schedule (`out`) against true decoding (`true`)."""
    trained, decoded = (float(_nats(x.logits, labels).nanmean()) for x in (out, true))
    far = _distance(out.memory, true.memory)[real]
    values = {"nats_training": trained, "nats_true": decoded}
    values |= {"memory_mean": float(far.mean()), "memory_largest": float(far.max())}
    line = (
        f"{label(model.schedule)}: {trained:.4f} nats, true decoding {decoded:.4f} ({decoded - trained:+.4f}); memory"
    )
    line += f" off by {values['memory_mean']:.1e} (mean), {values['memory_largest']:.1e} (largest)"
    return Check("gap", None if math.isfinite(trained + decoded) else False, line, values)


def by_position(out, true, labels: Tensor, real: Tensor) -> Check:
    """The gap in each quarter of the text."""
    more_BT = _nats(true.logits, labels) - _nats(out.logits, labels)
    far_BT = _distance(out.memory, true.memory).masked_fill(~real, math.nan)
    parts = torch.arange(labels.shape[1]).tensor_split(PARTS)
    rows = [(int(p[0]), int(p[-1]), float(more_BT[:, p].nanmean()), float(far_BT[:, p].nanmean())) for p in parts]
    said = [f"{first}-{last}: {nats:+.4f} nats, memory {far:.1e}" for first, last, nats, far in rows]
    return Check("position", None, "true decoding less training: " + "; ".join(said), {"parts": rows})


def by_sweep(model, forward: dict, true, labels: Tensor, real: Tensor) -> Check:
    """Loss and memory of the training schedule cut off after each of its passes over the text."""
    rows = [
        (name, float(_nats(logits, labels).nanmean()), float(_distance(memory, true.memory)[real].mean()))
        for name, logits, memory in sweeps(model, **forward, schedule=model.schedule)
        if memory is not None
    ]
    told = rows if len(rows) <= SWEEPS else rows[: SWEEPS - 1] + rows[-1:]
    said = [f"{name}: {nats:.4f} nats, memory {far:.1e}" for name, nats, far in told]
    return Check("sweep", None, "; ".join(said), {"passes": rows})


@dataclass(frozen=True)
class _Watched(Schedule):
    """Jacobi sweeps that write down by how much each moved the memory."""

    K: int
    moved: list[float] = field(default_factory=list)

    def sweeps(self, T: int):
        yield Sweep(range(T))
        for _ in range(self.K):
            self.moved.append((yield Sweep(range(T), measure=True)))
        return self.moved[-1]


def contraction(model, forward: dict) -> Check:
    """By what factor a parallel sweep shrinks the change of the memory (the geometric mean over sweeps)."""
    watched = _Watched(K=min(16, forward["input_ids"].shape[1] // 2))
    model(**forward, schedule=watched, use_cache=False)
    seen, floor = watched.moved, FLOOR.get(model.dtype, 2e-2)
    if not all(map(math.isfinite, seen)):
        return Check("contraction", False, "NO: the memory is not finite", {"rate": math.nan, "changes": seen})
    above = next((i for i, change in enumerate(seen) if not change > floor), len(seen))  # how many are not rounding
    kept = [max(change, floor) for change in seen[: above + 1]]
    rate = 0.0 if above == 0 else (kept[-1] / kept[0]) ** (1 / max(len(kept) - 1, 1))
    word = "contracts" if rate < SAFE else "hardly contracts" if rate < 1 else "does NOT contract"
    safe = "safe" if rate < SAFE else "not safe, use live sweeps"
    line = f"{word}: a sweep leaves {rate:.2f} of the change before it; the adjoint gradient is {safe}"
    line = line if above else "the memory changes nothing: the gates are closed"
    return Check("contraction", None, line, {"rate": rate, "changes": seen})


def advice(distance: Callable[[Schedule], tuple[float, float]], T: int, rate: float) -> Check:
    """The cheapest `Cyclic(G, n)` that comes within each goal of the true memory (mean over positions)."""
    if rate == 0:
        return Check("schedule", None, "any: while the memory changes nothing, all are the same", {"reached": {}})
    tried: dict[tuple[int, int], float] = {}
    reached: dict[float, tuple[int, int]] = {}
    for n, G in product(range(1, ROUNDS + 1), SUBSETS):
        if len(reached) < len(GOALS) and n * G <= T // 2:  # n G >= T is exact for any model and would say nothing
            tried[n, G] = distance(Cyclic(G, n))[0]
            reached = {goal: (n, G) for goal in GOALS if tried[n, G] <= goal} | reached
    goals = sorted(reached, reverse=True)
    parts = [f"within {g:.0e} of the true memory: Cyclic({reached[g][1]}, {reached[g][0]})" for g in goals]
    missed = max((goal for goal in GOALS if goal not in reached), default=None)
    if missed is not None:
        best = min(((far, f" (Cyclic({G}, {n}): {far:.1e})") for (n, G), far in tried.items()), default=(0, ""))
        parts.append(f"{missed:.0e} needs Converge(){best[1]}")
    if rate < SAFE:
        k = max(1, math.ceil(math.log(ENOUGH) / math.log(rate)) - 1)  # k products leave out rate ** (k + 1)
        parts.append(f"adjoint={k} should keep {1 - ENOUGH:.0%} of the gradient through time")
    else:
        parts.append("train with live sweeps (adjoint=None)")
    values = {"reached": {goal: Cyclic(G, n) for goal, (n, G) in reached.items()}, "tried": tried}
    return Check("schedule", None, "; ".join(parts), values)


def gradient(model, text: dict[str, Tensor], rows: int = 2, length: int = 64) -> Check:
    """The gradient of the loss under the training schedule against backpropagation through time.

    That of all tokens, and that of the tokens in each quarter of the text by itself (`parts`).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        return Check("gradient", None, "nothing is trainable: every parameter is frozen")
    short = {name: value[:rows, :length] for name, value in text.items()}
    weights = [p for _, p in named]

    def of(schedule: Schedule, labels: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            loss = model(**short | {"labels": labels}, schedule=schedule, use_cache=False).loss
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, weights, strict=True)]

    mine, true = (of(schedule, short["labels"]) for schedule in (model.schedule, Sequential()))
    cosine, error = _compare(mine, true)
    own = [name.startswith("undertow.") for name, _ in named]
    parts = [_compare(of(model.schedule, one), of(Sequential(), one))[0] for one in _parts(short["labels"])]
    values: dict[str, Any] = {"cosine": cosine, "error": error, "parts": parts}
    line = f"{label(model.schedule)} against backpropagation through time: cosine {cosine:.4f}, {error:.1%} off"
    line += f"; of the tokens of each quarter {', '.join(f'{part:.4f}' for part in parts)}"
    if any(own) and not all(own):
        picked = [[g for g, ours in zip(side, own, strict=True) if ours] for side in (mine, true)]
        values["added_cosine"], values["added_error"] = _compare(*picked)
        line += f" (added modules {values['added_cosine']:.4f}, {values['added_error']:.1%})"
    return Check("gradient", None if math.isfinite(error) else False, line, values)


def _parts(labels: Tensor) -> list[Tensor]:
    """The labels of each quarter alone, those that have any."""
    position_T = torch.arange(labels.shape[1], device=labels.device)
    alone = [labels.masked_fill(~torch.isin(position_T, part), -100) for part in position_T.tensor_split(PARTS)]
    return [one for one in alone if bool((one[:, 1:] != -100).any())]


def _compare(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """Cosine of two gradients, and the norm of their difference over that of `b`; summed tensor by tensor."""

    def dot(x: list[Tensor], y: list[Tensor]) -> float:
        return sum(float((p.to(_wide(p)) * q.to(_wide(q))).sum()) for p, q in zip(x, y, strict=True))

    off = [p - q for p, q in zip(a, b, strict=True)]
    aa, bb = (max(dot(x, x), 1e-30) for x in (a, b))
    return dot(a, b) / math.sqrt(aa * bb), math.sqrt(dot(off, off) / bb)


def exact(model, forward: dict, true) -> Check:
    """`Converge()` against token by token, and what it costs."""
    out = model(**forward, schedule=Converge(), use_cache=False)
    off, T = apart(out.logits, true.logits), forward["input_ids"].shape[1]
    ok = off <= tolerance(model)
    line = f"{'yes' if ok else 'NO'}: Converge() = token by token to {off:.1e}, {out.passes:.0f} passes for {T} steps"
    return Check("exact", ok, line, {"logits": off, "passes": out.passes, "residual": out.residual})
