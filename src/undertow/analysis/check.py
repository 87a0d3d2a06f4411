"""Is what a model computes what it says: causal, cached, padded, packed and batched alike, trained as it is decoded?

The first five checks are about the structure. They hold for any weights, so they run on random tokens, with gates that
are closed (all zero, as in a model that was just wrapped) opened: behind a closed gate no fault can be seen. The others
measure, with the weights as they are and on the text given, how far a schedule is from the recurrence it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from undertow.analysis import Check, Report, label, open_target
from undertow.model import UndertowForCausalLM
from undertow.schedules import Chunked, Converge, Cyclic, Interleaved, Jacobi, Schedule, Sequential, Sweep

__all__ = ["Check", "Report", "run"]

# Two ways of computing the same logits, largest difference over largest logit. Measured in float32: rounding 1e-6, the
# faults of the tests 3e-4 (through a gate that is open by 0.7 %) to 1; 1e-4 lies between. Measured in bfloat16: 2e-2.
# In float64 1e-9, but Hugging Face's RMSNorm and rotary embedding work in float32 inside: 1e-5 where they are used.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SINGLE_INSIDE = 1e-5
FLOOR = {torch.float64: 1e-11, torch.float32: 3e-6}  # a relative change of the memory that is only rounding; half: 2e-2
SAFE = 0.9  # the contraction rate below which a handful of adjoint products is enough
SHORT = 16  # positions of the structural checks: enough for every schedule below to sweep several positions at once
OTHERS = (Converge(G=4), Sequential(), Jacobi(2), Interleaved(2), Cyclic(4, 1), Chunked(4))
SUBSETS, ROUNDS = (8, 16), 4  # of the cyclic schedules that are tried
GOALS = (1e-3, 1e-5)  # memory distances for which a schedule is advised
ENOUGH = 0.05  # what the adjoint may leave out of the gradient
NO_MEMORY = Check("memory", None, "no memory: every schedule is one sweep, what is trained is what is decoded")


def run(
    target,
    input_ids: Tensor | Mapping[str, Tensor] | None = None,
    *,
    batch: int = 4,
    length: int = 128,
    schedules: Sequence[Schedule] | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> Report:
    """Check a model. It is left as it was: mode, weights, gradients and random numbers.

    Args:
        target: a model; or a recipe, its file, or the folder of a run (see `open_target`).
        input_ids: text rows `_BT`, or a batch as `undertow.data.collate` makes it. None: the first validation rows of a
            run, random tokens for anything else.
        batch, length: at most so many rows, and so many positions of each, are measured on.
        schedules: causality is checked under these (None: the training schedule and one of each kind).
        seed: of the random tokens.
        overrides, device: `section.key=value` texts and the device, where `target` is not a model.

    Returns:
        A report with the checks `causal`, `cached`, `padded`, `packed`, `batched`; then, with a memory, `gap`,
        `contraction`, `schedule`, `gradient`, `exact`, and without one `memory`.

    Raises:
        ValueError: a target that cannot be checked, rows of fewer than 8 positions, a recipe that does not load.
        FileNotFoundError: no such file.
    """
    name, model, rows = open_target(target, overrides, device, rows=batch if input_ids is None else 0)
    rows = rows if input_ids is None else input_ids
    if model.device.type == "meta":
        raise ValueError("check: the model is on the meta device, where nothing is computed")
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.get_text_config().max_position_embeddings
    with _undisturbed(model):
        length = min(length, limit)
        text = _text(_tokens(model, batch, length, generator) if rows is None else rows, batch, length, model)
        subject = Subject(model, _opened(model, generator), _tolerance(model))
        others = (model.schedule, *OTHERS) if schedules is None else schedules
        named = {label(s): s for s in others} if model.program.memories else {"one sweep": Converge()}
        with torch.no_grad():
            x = _tokens(model, 3, min(SHORT, limit), generator)
            checks = [causal(subject, x, named, generator)]
            checks += [check(subject, x) for check in (cached, padded, packed, batched)]
        checks += _time(model, text) if model.program.memories else [NO_MEMORY]
    return Report(name, tuple(checks))


# ---------------------------------------------------------------------- what is checked, and with what


@dataclass(frozen=True)
class Subject:
    """A model as the structural checks call it: closed gates opened, its own tensors untouched."""

    model: UndertowForCausalLM
    opened: Mapping[str, Tensor]
    tolerance: float

    def __call__(self, input_ids: Tensor, **arguments):
        return functional_call(self.model, dict(self.opened), (input_ids,), arguments)

    def verdict(self, name: str, claim: str, found: Mapping[str, float]) -> Check:
        """A check that holds if every difference found is within the tolerance."""
        worst = max(found, key=lambda where: found[where] if math.isfinite(found[where]) else math.inf)
        ok = found[worst] <= self.tolerance
        line = f"yes: {claim}, largest difference" if ok else f"NO: {claim} does not hold: {worst}, off by"
        return Check(name, ok, f"{line} {found[worst]:.1e}", dict(found, tolerance=self.tolerance))


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def _undisturbed(model: UndertowForCausalLM):
    """Evaluation mode within; afterwards every module's mode and the random numbers are what they were."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _tolerance(model: UndertowForCausalLM) -> float:
    single_inside = model.dtype == torch.float64 and model.view.family.rotary is not None
    return SINGLE_INSIDE if single_inside else TOLERANCE[model.dtype]


def _opened(model: UndertowForCausalLM, generator: torch.Generator) -> dict[str, Tensor]:
    """Values for those of our parameters that are all zero: about a half for scalars, small noise for the others."""
    found = {}
    for name, p in model.undertow.named_parameters(prefix="undertow"):
        if not bool(p.any()):
            noise = torch.randn(p.shape, generator=generator)
            value = 0.5 + 0.1 * noise if p.numel() == 1 else noise / math.sqrt(p.shape[-1] if p.dim() > 1 else 100)
            found[name] = value.to(p.device, p.dtype)
    return found


def _tokens(model: UndertowForCausalLM, B: int, T: int, generator: torch.Generator) -> Tensor:
    V = model.get_input_embeddings().num_embeddings
    return torch.randint(0, V, (B, T), generator=generator).to(model.device)


def _text(rows: Tensor | Mapping[str, Tensor], batch: int, length: int, model) -> dict[str, Tensor]:
    """The arguments of a forward, with labels, cut to `batch` rows of `length` positions."""
    held = {"input_ids": rows} if isinstance(rows, Tensor) else dict(rows)
    shape = tuple(held["input_ids"].shape)
    if len(shape) != 2 or shape[0] < 1 or min(shape[1], length) < 8:
        raise ValueError(f"check: input_ids has shape {shape}, length is {length}: needs (rows, at least 8 positions)")
    held = {name: value[:batch, :length].to(model.device) for name, value in held.items() if value is not None}
    return {"labels": held["input_ids"]} | held


# ---------------------------------------------------------------------- structure


def causal(subject: Subject, x: Tensor, schedules: Mapping[str, Schedule], generator: torch.Generator) -> Check:
    """Tokens from t on are replaced, for every t: no logit before t may move. And a prefix alone says the same."""
    T = x.shape[1]
    x = x[:1].repeat(T - 1, 1)
    later_TT = torch.ones_like(x, dtype=torch.bool).triu(1)  # row r keeps the tokens 0..r
    other = torch.where(later_TT, _tokens(subject.model, T - 1, T, generator), x)
    unmoved = 1e-12 if subject.model.dtype == torch.float64 else 1e-6  # bit for bit, if the kernels keep their order
    cut, leaks, prefixes, broken = 2 * T // 3, {}, {}, ""
    for name, schedule in schedules.items():
        if isinstance(schedule, Converge):  # when it stops may depend on the whole text, by design
            schedule = replace(schedule, tol=0.0)
        a, b = (subject(ids, schedule=schedule, use_cache=False).logits for ids in (x, other))
        moved_TT = (a - b).abs().amax(-1).masked_fill(later_TT, 0) / a.abs().max()
        leaks[name] = float(moved_TT.max())
        prefixes[name] = apart(subject(x[:1, :cut], schedule=schedule, use_cache=False).logits, a[:1, :cut])
        if not leaks[name] <= unmoved:
            row, position = divmod(int(moved_TT.nan_to_num(math.inf).argmax()), T)
            broken = broken or f"under {name} logits at {position} move by {leaks[name]:.1e} with tokens after {row}"
        if not prefixes[name] <= subject.tolerance:
            broken = broken or f"under {name} the first {cut} tokens alone have logits {prefixes[name]:.1e} off"
    under = f", under {len(leaks)} schedules" if len(leaks) > 1 else ""
    line = f"yes: no token moves an earlier logit ({max(leaks.values()):.1e}){under}"
    both = "" if subject.model.program.causal else "; NOT within a prefix_mask, which it reads in both directions"
    line = f"NO: {broken}" if broken else f"{line}; prefixes agree to {max(prefixes.values()):.1e}{both}"
    return Check("causal", not broken, line, {"leaks": leaks, "prefixes": prefixes, "tolerance": subject.tolerance})


def _decoded(subject: Subject, x: Tensor, sizes: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Logits `_BTV` of a text given in pieces, through the cache."""
    cache, parts, start = None, [], 0
    for size in sizes:
        part = slice(start, start + size)
        seen = None if mask is None else mask[:, : start + size]
        out = subject(x[:, part], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        parts.append(out.logits)
    return torch.cat(parts, 1)


def cached(subject: Subject, x: Tensor) -> Check:
    """A prefill, a second piece of three tokens and then one by one, against one forward."""
    T, half = x.shape[1], x.shape[1] // 2
    full = subject(x, use_cache=False).logits
    stepped = _decoded(subject, x, [half, 3, *[1] * (T - half - 3)])
    found = {"prefill": apart(stepped[:, :half], full[:, :half]), "after it": apart(stepped[:, half:], full[:, half:])}
    return subject.verdict("cached", "decoding through the cache = one forward", found)


def padded(subject: Subject, x: Tensor) -> Check:
    """Rows padded on the left against the rows alone, in one forward and decoded; pads leave no memory."""
    T, pads = x.shape[1], (0, x.shape[1] // 4, 2)
    mask = torch.arange(T, device=x.device)[None] >= torch.tensor(pads, device=x.device)[:, None]
    out = subject(x, attention_mask=mask.long(), use_cache=False)
    stepped = _decoded(subject, x, [T - 4, 1, 1, 1, 1], mask.long())
    found = {}
    if out.memory is not None:
        found["memory of pads"] = float(out.memory[~mask].abs().max() / out.memory.abs().max())
    for b, n in enumerate(pads):
        alone = subject(x[b : b + 1, n:], use_cache=False).logits[0]
        found[f"row with {n} pads"] = apart(out.logits[b, n:], alone)
        found[f"row with {n} pads, decoded"] = apart(stepped[b, n:], alone)
    return subject.verdict("padded", "left-padded rows = rows alone", found)


def packed(subject: Subject, x: Tensor) -> Check:
    """Documents packed in one row, borders by position ids, against the documents alone."""
    T = x.shape[1]
    lengths = [T // 3, 2, T - T // 3 - 2]
    position_ids = torch.cat([torch.arange(n, device=x.device) for n in lengths])[None]
    separate = torch.cat([subject(piece, use_cache=False).logits for piece in x[:1].split(lengths, 1)], 1)
    found = {}
    for schedule in (Converge(G=4), Sequential()):
        together = subject(x[:1], position_ids=position_ids, schedule=schedule, use_cache=False).logits
        found[label(schedule)] = apart(together, separate)
    return subject.verdict("packed", "packed documents = separate documents", found)


def batched(subject: Subject, x: Tensor) -> Check:
    """Rows of a batch against single rows; and a reordered cache (beams) goes on as its rows would."""
    T = x.shape[1]
    together = subject(x, use_cache=False).logits
    found = {f"row {b}": apart(together[b : b + 1], subject(x[b : b + 1], use_cache=False).logits) for b in (0, 1, 2)}
    order, old = torch.tensor([2, 0, 0], device=x.device), slice(0, T - 2)
    cache = subject(x[:, old], use_cache=True).past_key_values
    cache.reorder_cache(order)
    swapped = torch.cat([x[order, old], x[:, T - 2 :]], 1)
    went_on = subject(swapped[:, T - 2 :], past_key_values=cache, use_cache=True).logits
    found["reordered cache"] = apart(went_on, subject(swapped, use_cache=False).logits[:, T - 2 :])
    return subject.verdict("batched", "a row's result does not depend on its batch", found)


# ---------------------------------------------------------------------- the recurrence over time


def _time(model: UndertowForCausalLM, text: dict[str, Tensor]) -> list[Check]:
    labels = text["labels"]
    forward = {name: value for name, value in text.items() if name != "labels"}
    real = forward["attention_mask"].bool() if "attention_mask" in forward else torch.ones_like(labels).bool()
    with torch.no_grad():
        true = model(**forward, schedule=Sequential(), use_cache=False)

        def distance(schedule: Schedule) -> tuple[float, float]:
            return _distance(model(**forward, schedule=schedule, use_cache=False).memory, true.memory, real)

        gaps, shrinks = gap(model, forward, labels, true, real), contraction(model, forward)
        advised = advice(distance, labels.shape[1], shrinks.values["rate"])
        return [gaps, shrinks, advised, gradient(model, text), exact(model, forward, true)]


def _distance(memory: Tensor, true: Tensor, real_BT: Tensor) -> tuple[float, float]:
    """Mean and largest `|M - M_true| / |M_true|` over the positions that are no pads."""
    memory, true = memory.flatten(2).to(_wide(memory)), true.flatten(2).to(_wide(true))
    d_BT = (memory - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-8)
    return float(d_BT[real_BT].mean()), float(d_BT[real_BT].max())


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _nats(logits: Tensor, labels: Tensor) -> float:
    scores = logits[:, :-1].to(_wide(logits))
    return float(F.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100))


def gap(model, forward: dict, labels: Tensor, true, real: Tensor) -> Check:
    """Loss and memory under the training schedule against true decoding."""
    out = model(**forward, schedule=model.schedule, use_cache=False)
    trained, decoded = _nats(out.logits, labels), _nats(true.logits, labels)
    mean, largest = _distance(out.memory, true.memory, real)
    ok = None if math.isfinite(trained + decoded) else False
    line = f"{label(model.schedule)}: {trained:.4f} nats, true decoding {decoded:.4f} ({decoded - trained:+.4f})"
    line += f"; memory off by {mean:.1e} (mean), {largest:.1e} (largest)"
    values = {"nats_training": trained, "nats_true": decoded, "memory_mean": mean, "memory_largest": largest}
    return Check("gap", ok, line, values)


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
    """The gradient of the loss under the training schedule against backpropagation through time."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        return Check("gradient", None, "nothing is trainable: every parameter is frozen")
    short = {name: value[:rows, :length] for name, value in text.items()}

    def of(schedule: Schedule) -> list[Tensor]:
        with torch.enable_grad():
            loss = model(**short, schedule=schedule, use_cache=False).loss
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, (_, p) in zip(found, named, strict=True)]

    mine, true = of(model.schedule), of(Sequential())
    cosine, error = _compare(mine, true)
    values, own = {"cosine": cosine, "error": error}, [name.startswith("undertow.") for name, _ in named]
    line = f"{label(model.schedule)} against backpropagation through time: cosine {cosine:.4f}, {error:.1%} off"
    if any(own) and not all(own):
        picked = [[g for g, ours in zip(side, own, strict=True) if ours] for side in (mine, true)]
        values["added_cosine"], values["added_error"] = _compare(*picked)
        line += f" (added modules {values['added_cosine']:.4f}, {values['added_error']:.1%})"
    return Check("gradient", None if math.isfinite(error) else False, line, values)


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
    ok = off <= _tolerance(model)
    line = f"{'yes' if ok else 'NO'}: Converge() = token by token to {off:.1e}, {out.passes:.0f} passes for {T} steps"
    return Check("exact", ok, line, {"logits": off, "passes": out.passes, "residual": out.residual})
