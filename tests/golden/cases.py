"""The golden cases: reading them, float64 all the way through Hugging Face's own modules, and comparing."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"
DTYPES = {"wide": torch.float64, "released": torch.float32}
WIDE = 1e-11  # the tolerance in float64
LEAST = 3e-5  # and the least one in float32: the same case rounds 20 times differently on another processor

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One golden case. `entry` is its entry in the index."""

    entry: Mapping[str, Any]

    def __str__(self):
        return self.name

    @property
    def name(self) -> str:
        return self.entry["case"]

    @property
    def peer(self) -> str:
        """The folder of the published code it is from: the name of the module that maps it to ours."""
        return self.name.split("/")[0]

    @property
    def ours(self) -> Mapping[str, Any]:
        """What undertow calls its settings; empty where no model is built."""
        return self.entry.get("undertow") or {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its settings, as published."""
        return self.entry["settings"]

    @property
    def checkpoint(self) -> Path | None:
        """The published folder that holds its weights."""
        return DATA / self.entry["checkpoint"] if "checkpoint" in self.entry else None

    def tolerance(self, kind: str) -> float:
        """How far from `wide` or `released` outputs ours may be."""
        if kind == "wide":
            return WIDE
        agrees = self.entry["agrees"]
        return max(LEAST, 10 * agrees.get("released_but_known", agrees.get("released", 0.0)))

    def read(self) -> tuple[Tensors, Tensors, dict[str, Tensors]]:
        """`(weights, inputs, {"wide": outputs, "released": outputs})`."""
        parts: dict[str, Tensors] = {"weights": {}, "in": {}, "out": {}, "released": {}}
        files = [self.entry["shared"]] if "shared" in self.entry else []
        for file in [*files, self.entry["file"]]:  # a case's own come last
            for name, x in load_file(DATA / file).items():
                group, _, rest = name.partition("/")
                if file not in files or not re.fullmatch(self.entry.get("shared_skip", ""), rest):
                    parts[group][rest] = x
        weights = parts["weights"] if self.checkpoint is None else _tensors(self.checkpoint)
        return weights, parts["in"], {"wide": parts["out"], "released": parts["released"]}


def _tensors(folder: Path) -> Tensors:
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.name.startswith(("model_", "step_")):
            return {name: x.float() for name, x in torch.load(path, weights_only=True).items()}
    raise FileNotFoundError(f"{folder} holds no weights")


CASES = [Case(entry) for entry in json.loads((DATA / "index.json").read_text())["cases"]]


# ---------------------------------------------------------------------- float64


def _normed(self, hidden_states):
    x = hidden_states
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _tables(self, x, position_ids=None, **_):
    angle = position_ids.to(x.dtype)[..., None] * self.wide_inv_freq.to(x.dtype)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def widen(model: torch.nn.Module, theta: float = 10000.0) -> torch.nn.Module:
    """Hugging Face's RMS norms and plain rotary tables, which compute in float32, in the model's own type. In place."""
    for module in model.modules():
        kind = type(module).__name__
        if hasattr(module, "variance_epsilon") and kind.endswith("RMSNorm"):
            module.forward = types.MethodType(_normed, module)
        elif kind.endswith("RotaryEmbedding") and hasattr(module, "inv_freq"):
            half = len(module.inv_freq)
            module.wide_inv_freq = theta ** (-torch.arange(half, dtype=torch.float64) / half)
            module.forward = types.MethodType(_tables, module)
    return model


# ---------------------------------------------------------------------- comparing


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value of theirs; infinite where sizes differ or ours is not finite."""
    a, b = ours.detach().double(), theirs.detach().double()
    if a.numel() != b.numel() or not bool(torch.isfinite(a).all()):
        return float("inf")
    if b.numel() == 0:
        return 0.0
    return float((a.reshape(b.shape) - b).abs().max() / (b.abs().max() or 1.0))


def gaps(found: Mapping[str, Any], wanted: Tensors) -> dict[str, float]:
    """The gap of every output that is wanted; where several are found under one name, the largest.

    Raises:
        KeyError: one was not computed.
    """
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise KeyError(f"not computed: {missing}")
    many = {key: found[key] if isinstance(found[key], list) else [found[key]] for key in wanted}
    return {key: max(gap(x, wanted[key]) for x in many[key]) for key in wanted}


def fill(model: torch.nn.Module, given: Tensors, kept: tuple[str, ...] = ()) -> torch.nn.Module:
    """Copy tensors into a model, every one of both sides; `kept`: names of ours that stay as they are.

    Raises:
        ValueError: a tensor without a place, or one of ours that stays empty.
    """
    state = model.state_dict()
    empty, unused = set(state) - set(given) - set(kept), set(given) - set(state)
    empty = {
        name for name in empty if not any(state[name].data_ptr() == state[n].data_ptr() for n in given if n in state)
    }
    if empty or unused:
        raise ValueError(f"not filled: {sorted(empty)}; without a place: {sorted(unused)}")
    with torch.no_grad():
        for name, x in given.items():
            state[name].copy_(x.to(state[name].dtype).reshape(state[name].shape))
    return model
