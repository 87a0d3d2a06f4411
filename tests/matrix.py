"""The checks that every (method x family) row inherits: DESIGN's matrix, one function a row.

A new method or family adds a `Case` to `tests/test_matrix.py` and gets all of them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import undertow as ut
from models import CONFIGS, TOLERANCE, V, build, gap, gradient_gap, gradients, ids, randomise
from rounding import assert_copied, assert_same
from undertow import adjoint, reference

EVERY_SCHEDULE = ("llama", "gpt2", "undertow_nanochat")


@dataclass(frozen=True)
class Case:
    family: str
    depth: Any = None
    time: Any = None

    def __str__(self):
        return f"{self.family}-{_label(self.depth)}-{_label(self.time)}"

    def build(self, **config):
        return build(self.family, self.depth, self.time, **config)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.family]

    def some(self, schedules: list) -> list:
        """Those that a row goes through: all in a memory's own cases, every third in a pair's and in those of further
        families, whose parts know no schedule; one or two without a memory, when all are one and the same pass."""
        if self.time is None:
            return schedules[::5]
        return schedules if self.depth is None and self.family in EVERY_SCHEDULE else schedules[::3]


def _label(method) -> str:
    if method is None:
        return "none"
    values = ",".join(str(v) for v in method.to_dict().values())
    return values.replace(" ", "")


T = 11
SHORT = 6  # of the row that costs most


def exact(T: int) -> list:
    """Every schedule at its exact limit, for T positions."""
    return [
        ut.Sequential(),
        ut.Jacobi(T - 1),
        ut.Jacobi(T, start="unmixed"),
        ut.Interleaved(T),
        ut.Cyclic(4, -(-T // 4)),
        ut.Cyclic(T, 1),
        ut.Chunked(1),
        ut.Converge(),
        ut.Converge(G=3),
        ut.Cyclic(4, -(-T // 4), adjoint=2),
        ut.Cyclic(4, -(-T // 4), adjoint=-(-T // 4), solve="cyclic"),
        ut.Interleaved(T, refresh=True),
    ]


INEXACT = [
    ut.Jacobi(2),
    ut.Jacobi(3, backward=1),
    ut.Jacobi(2, settle=True),
    ut.Jacobi(1, loss="mean", start="unmixed"),
    ut.Jacobi(2, loss=(0.1, 0.3, 0.6)),
    ut.Interleaved(2),
    ut.Interleaved(3),
    ut.Interleaved(3, refresh=True),
    ut.Cyclic(4, 1),
    ut.Cyclic(3, 2, backward=1),
    ut.Chunked(4),
    ut.Converge(1e-2, G=2),
]


def padded(x: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with `pads[b]` pads on the left: `(input_ids, attention_mask)`."""
    mask = torch.ones_like(x)
    for b, n in enumerate(pads):
        mask[b, :n] = 0
    return torch.where(mask.bool(), x, 1), mask


@torch.no_grad()
def row_1_identity_at_start(case: Case):
    """A wrapped model's logits are the backbone's, to rounding, padded input too."""
    torch.manual_seed(1)
    base = randomise(AutoModelForCausalLM.from_config(CONFIGS[case.family]()).double()).eval()
    x, mask = padded(ids(2, T), [0, 3])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    plain, pads = base(ids(2, T)).logits, base(x, attention_mask=mask, position_ids=position_ids).logits
    model = ut.wrap(base, depth=_identity(case.depth), time=case.time)
    full = model(ids(2, T), schedule=ut.Jacobi(0)).logits
    assert_same(full, plain)
    real = mask.bool()
    assert gap(model(x, attention_mask=mask, position_ids=position_ids).logits[real], pads[real]) < 1e-12
    for schedule in (ut.Sequential(), ut.Cyclic(4, 1), ut.Interleaved(2), ut.Chunked(4)):
        assert gap(model(ids(2, T), schedule=schedule).logits, plain) < case.tolerance


def _identity(depth):
    """A depth method as it is at the start of a retrofit: counts of one where a count is what it has."""
    if isinstance(depth, ut.ReuseMap):
        return ut.ReuseMap([1] * len(depth.counts))
    if isinstance(depth, ut.BlockLoop):
        return ut.BlockLoop(1, depth.inject)
    if isinstance(depth, ut.MiddleLoop):
        return ut.MiddleLoop(depth.start, depth.end, 1, depth.inject)
    return depth


def row_2_executor_equals_references(case: Case, gradient: bool = True):
    """Outputs and gradients of every schedule: at the exact limit those of the recurrence, else the literal sweeps'."""
    model, x = case.build(), ids(2, SHORT)
    w = torch.randn(2, SHORT, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    true, memory = reference.recur(model, x)
    true_gradient = gradients(model, (true * w).sum()) if gradient else None
    for schedule in case.some(exact(SHORT)):
        out = model(x, schedule=schedule)
        assert gap(out.logits, true) < case.tolerance, schedule
        if memory is not None:
            assert gap(out.memory, memory[:, :, 0]) < case.tolerance, schedule
        if gradient and (schedule.adjoint is None or schedule.solve == "cyclic"):
            assert gradient_gap(gradients(model, (out.logits * w).sum()), true_gradient) < case.tolerance, schedule
    for schedule in case.some(INEXACT):
        out = model(x, schedule=schedule)
        literal, parts, _ = reference.sweep(model, schedule, x)
        assert gap(out.logits, literal) < case.tolerance, schedule
        if gradient:
            mine = gradients(model, (out.logits * w).sum())
            assert gradient_gap(mine, gradients(model, (literal * w).sum())) < case.tolerance, schedule
        loss = model(x, labels=x, schedule=schedule).loss.detach()
        assert abs(float(loss - literal_loss(parts, x))) < case.tolerance * max(1, float(loss)), schedule


def literal_loss(parts, labels) -> torch.Tensor:
    """`sum_s w_s nats_s / N_s`, written out: N_s is N times what a full row has of its targets at the sweep's rows."""
    targets, full = F.pad(labels[:, 1:], (0, 1), value=-100), labels.shape[1] - 1
    total = 0.0
    for logits, rows, weight in parts:
        t = targets[:, rows]
        nats = -torch.log_softmax(logits, -1).gather(-1, t.clamp(min=0)[..., None])[..., 0]
        total = total + weight * nats[t != -100].sum() * full / max(len([r for r in rows if r < full]), 1)
    return (total / (targets != -100).sum()).detach()


@torch.no_grad()
def row_3_cached_equals_full(case: Case):
    """Prefill and token-by-token decoding, and a chunked prefill, equal one full forward; masked too."""
    model, x = case.build(), ids(2, T)
    for mask in (None, (torch.arange(T) % 3 != 1).expand(2, T)):
        full = model(x, memory_mask=mask).logits
        for chunks in ([5] + [1] * (T - 5), [4, 1, 3, 3], [T]):
            cache, parts, start = None, [], 0
            for size in chunks:
                part = slice(start, start + size)
                part_mask = None if mask is None else mask[:, part]
                out = model(x[:, part], past_key_values=cache, use_cache=True, memory_mask=part_mask)
                cache, start = out.past_key_values, start + size
                parts.append(out.logits)
            assert gap(torch.cat(parts, 1), full) < case.tolerance, chunks


@torch.no_grad()
def row_4_padded_equals_single(case: Case):
    """Left-padded rows of a batch equal the rows alone, in one forward and in cached decoding."""
    model, pads = case.build(), [0, 4, 2]
    x, mask = padded(ids(3, T), pads)
    batch = model(x, attention_mask=mask).logits
    prefill = model(x[:, :7], attention_mask=mask[:, :7], use_cache=True)
    steps = [prefill.logits]
    cache = prefill.past_key_values
    for t in range(7, T):
        out = model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        steps.append(out.logits)
    for b, n in enumerate(pads):
        single = model(x[b : b + 1, n:]).logits[0]
        assert gap(batch[b, n:], single) < case.tolerance
        assert gap(torch.cat(steps, 1)[b, n:], single) < case.tolerance


@torch.no_grad()
def row_5_causal(case: Case):
    """Changing token t changes no logit before t, under every schedule (and does change the one at t)."""
    model, x, t = case.build(), ids(2, T), 6
    changed = x.clone()
    changed[:, t] = (x[:, t] + 1) % V
    for schedule in case.some([*exact(T), *INEXACT]):
        if schedule == ut.Converge(1e-2, G=2):
            schedule = ut.Converge(0.0, G=2)  # when it stops depends on the whole text, by design
        a, b = model(torch.cat([x, changed]), schedule=schedule).logits.chunk(2)
        assert gap(a[:, :t], b[:, :t]) < 1e-12, schedule
        assert gap(a[:, t], b[:, t]) > 1e-6, schedule


@torch.no_grad()
def row_6_exact_limits(case: Case):
    """Positions 0..k after sweep k of Jacobi (unmixed start: 0..k-1), 0..nG-1 of Cyclic."""
    model, x = case.build(), ids(2, T)
    true = model(x, schedule=ut.Sequential()).memory
    if true is None:
        return
    for schedule, exact in (
        (ut.Jacobi(2), 3),
        (ut.Jacobi(3, start="unmixed"), 3),
        (ut.Cyclic(3, 1), 3),
        (ut.Cyclic(2, 2), 4),
        (ut.Interleaved(5), 5),
    ):
        memory = model(x, schedule=schedule).memory
        assert gap(memory[:, :exact], true[:, :exact]) < case.tolerance, schedule


@torch.no_grad()
def row_7_packed_equals_separate(case: Case):
    """Documents packed in one row, borders by position_ids, equal the documents alone; cached too."""
    model, lengths = case.build(), [4, 2, 5]
    x = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    pieces = x.split(lengths, 1)
    separate = [model(p).logits for p in pieces]
    for schedule in (ut.Converge(), ut.Sequential(), ut.Jacobi(T)):
        packed = model(x, position_ids=positions, schedule=schedule).logits
        assert gap(packed, torch.cat(separate, 1)) < case.tolerance, schedule
    cached = model(x[:, :6], position_ids=positions[:, :6], use_cache=True)
    rest = model(x[:, 6:], position_ids=positions[:, 6:], past_key_values=cached.past_key_values).logits
    assert gap(rest, separate[2]) < case.tolerance


@torch.no_grad()
def row_8_saved_equals_loaded(case: Case, folder):
    model, x = case.build(), ids(2, T)
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert_copied(loaded, model)
    assert_same(loaded(x).logits, model(x).logits)
    assert all(n.startswith(("backbone.", "undertow.")) for n in loaded.state_dict())


@torch.no_grad()
def row_9_generate(case: Case):
    """Greedy generate == argmax of full forwards; the beam's score == its text scored again."""
    model = case.build()
    x, mask = padded(ids(2, 6), [0, 2])
    new = 5
    generated = model.generate(x, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=1)
    for b, n in enumerate([0, 2]):
        text = x[b : b + 1, n:]
        for _ in range(new):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(text[0], generated[b, n:])
    beams = model.generate(
        x, attention_mask=mask, max_new_tokens=new, num_beams=3, num_return_sequences=3, do_sample=False,
        length_penalty=0.0, pad_token_id=1, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for i, n in enumerate([0, 0, 0, 2, 2, 2]):  # every beam, not the best alone: its parent is often the first row
        text = beams.sequences[i : i + 1, n:]
        nats = torch.log_softmax(model(text).logits, -1)[:, :-1].gather(-1, text[:, 1:, None])[0, -new:, 0]
        assert abs(float(nats.sum() - beams.sequences_scores[i])) < max(case.tolerance, 1e-5)


@contextmanager
def no_fallback():
    """What replaces the adjoint where a batch does not contract is decided batch by batch; random weights need not."""
    kept = adjoint.UNSOLVED, adjoint._grew
    adjoint.UNSOLVED, adjoint._grew = float("inf"), lambda *_: False
    try:
        yield
    finally:
        adjoint.UNSOLVED, adjoint._grew = kept


@no_fallback()
def row_10_checkpointing_and_accumulation(case: Case):
    """Recomputing visits changes no gradient; four micro-batches equal one batch."""
    model, x = case.build(), ids(4, T)
    labels = x.clone()
    labels[0, :5] = -100
    for schedule in (ut.Jacobi(2, backward=1), ut.Interleaved(2), ut.Cyclic(4, 1, adjoint=2)):
        whole = gradients(model, model(x, labels=labels, schedule=schedule).loss)
        model.gradient_checkpointing_enable()
        again = gradients(model, model(x, labels=labels, schedule=schedule).loss)
        model.gradient_checkpointing_disable()
        assert gradient_gap(again, whole) < 1e-12, schedule
        count = (labels[:, 1:] != -100).sum()
        parts = [
            gradients(
                model, model(x[i : i + 1], labels=labels[i : i + 1], schedule=schedule, num_items_in_batch=count).loss
            )
            for i in range(4)
        ]
        summed = {n: sum(p[n] for p in parts) for n in whole}
        assert gradient_gap(summed, whole) < case.tolerance, schedule


def row_12_ten_steps_lower_the_loss(case: Case):
    torch.manual_seed(0)
    model = ut.from_scratch(CONFIGS[case.family](), depth=case.depth, time=case.time).train()
    x = ids(4, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(x, labels=x).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


ROWS = {name: row for name, row in list(globals().items()) if name.startswith("row_")}


def every_row(cases, but=()):
    """Parametrise a test `test(row, case, ...)` over all rows and these cases; `but`: rows that are left out.

    Row 8 writes to a folder: a test that runs it takes pytest's `tmp_path` and calls `run(row, case, tmp_path)`.
    """
    kept = [row for name, row in ROWS.items() if name not in but]
    rows = pytest.mark.parametrize("row", kept, ids=lambda row: row.__name__)
    return lambda test: rows(pytest.mark.parametrize("case", cases, ids=str)(test))


def run(row, case: Case, folder):
    """One row on one case."""
    row(case, folder) if row is row_8_saved_equals_loaded else row(case)
