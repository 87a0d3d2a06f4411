"""Is what a model computes what it says: causal, cached, padded, packed and batched alike, trained as it is decoded?

The first five checks are about the structure. They hold for any weights, so they run on random tokens, with gates that
are closed (all zero, as in a model that was just wrapped) opened: behind a closed gate no fault can be seen. The others
measure, with the weights as they are and on the text given, how far a schedule is from the recurrence it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from undertow.analysis import Check, Report, label, open_target
from undertow.analysis.gap import apart, measured, tolerance
from undertow.model import UndertowForCausalLM
from undertow.schedules import Chunked, Converge, Cyclic, Interleaved, Jacobi, Schedule, Sequential

__all__ = ["Check", "Report", "run"]

SHORT = 16  # positions of the structural checks: enough for every schedule below to sweep several positions at once
OTHERS = (Converge(G=4), Sequential(), Jacobi(2), Interleaved(2), Cyclic(4, 1), Chunked(4))
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
    accept: bool = False,
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
        accept: of a run, measure on texts that are not its own, with a warning.

    Returns:
        A report with the checks `causal`, `cached`, `padded`, `packed`, `batched`; then, with a memory, `gap`,
        `contraction`, `schedule`, `gradient`, `exact`, and without one `memory`.

    Raises:
        ValueError: a target that cannot be checked, rows of fewer than 8 positions, a recipe that does not load.
        FileNotFoundError: no such file.
    """
    name, model, rows = open_target(target, overrides, device, batch if input_ids is None else 0, accept)
    rows = rows if input_ids is None else input_ids
    if model.device.type == "meta":
        raise ValueError("check: the model is on the meta device, where nothing is computed")
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.get_text_config().max_position_embeddings
    with _undisturbed(model):
        length = min(length, limit)
        text = _text(_tokens(model, batch, length, generator) if rows is None else rows, batch, length, model)
        subject = Subject(model, _opened(model, generator), tolerance(model))
        others = (model.schedule, *OTHERS) if schedules is None else schedules
        named = {label(s): s for s in others} if model.program.memories else {"one sweep": Converge()}
        with torch.no_grad():
            x = _tokens(model, 3, min(SHORT, limit), generator)
            checks = [causal(subject, x, named, generator)]
            checks += [check(subject, x) for check in (cached, padded, packed, batched)]
        checks += measured(model, text) if model.program.memories else [NO_MEMORY]
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
    unmoved = 1e-12 if subject.model.dtype == torch.float64 else 1e-6  # only rounding, of a kernel's own order
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
