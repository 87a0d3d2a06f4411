"""What undertow makes of a golden case, held against it."""

from __future__ import annotations

import importlib
import re
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import undertow as ut
from golden.cases import DTYPES, Case, gap, gaps
from golden.differences import standing
from undertow.convert import import_checkpoint


def measured(case: Case, kind: str) -> dict[str, float]:
    """The gap of every `wide` or `released` output."""
    peer = importlib.import_module(f"golden.{case.peer}")
    weights, inputs, outputs = case.read()
    found = peer.outputs(case, DTYPES[kind], weights, inputs, outputs[kind])
    return gaps(found, peer.expected(case, outputs[kind]))


def verdict(case: Case, kind: str) -> str:
    """Empty where a case holds: all outputs agree but those of standing differences, and each of these shows."""
    found, tolerance = measured(case, kind), case.tolerance(kind)
    known = standing(case, kind)
    excused = {key for key in found for d in known if re.fullmatch(d.outputs, key)}
    wrong = [f"{key} differs by {x:.1e}" for key, x in found.items() if key not in excused and not x <= tolerance]
    for d in known:
        if max(x for key, x in found.items() if re.fullmatch(d.outputs, key)) <= tolerance:
            wrong.append(f"the difference {d.name!r} is gone")
    return "; ".join(wrong)


def kinds(case: Case) -> list[str]:
    """`wide` and `released`, or the one of them that a case has."""
    return [kind for kind in DTYPES if kind == "wide" or case.entry["released"]]


@torch.no_grad()
def imported(case: Case) -> float:
    """The gap of the logits of what `undertow import` makes of a checkpoint folder. Raises what the import raises."""
    _, inputs, outputs = case.read()
    with tempfile.TemporaryDirectory() as folder:
        import_checkpoint(case.checkpoint, Path(folder) / "model")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
    x, released = inputs["input_ids"], outputs["released"]
    if case.peer == "t2mlr":
        return gap(model(x, memory_mask=(inputs["control_flows"] > 1).long()).logits, released["logits_exact"])
    return gap(model(x, schedule=ut.Jacobi(0)).logits, released["logits_zero_memory"])
