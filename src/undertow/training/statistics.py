"""What the mixers do while a model trains: gates, norms and scalars, at logging steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

CLOSED, OPEN = 0.05, 0.95  # a gate below or above counts as closed or open


class Statistics(TrainerCallback):
    """At each step that will be logged, look at the last call of every mixer in the step's first forward.

    Hooks live for that one forward: they are gone before its backward, which may recompute the calls. They keep
    detached tensors, draw no random numbers and change nothing.
    """

    def __init__(self) -> None:
        self.hooks: list[RemovableHandle] = []
        self.calls: dict[str, tuple[Tensor, ...]] = {}
        self.found: dict[str, float] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step + 1
        saved = step % state.save_steps == 0 or step == state.max_steps  # a checkpoint is logged too, see `Metrics`
        logged = step % state.logging_steps == 0 or step == 1 and args.logging_first_step
        if state.is_world_process_zero and (logged or saved):
            self.watch(model)

    def watch(self, model) -> None:
        """Watch the next forward of an `UndertowForCausalLM`."""
        mixers = {edge.mixer: None for step in model.program.steps for edges in step.edges.values() for edge in edges}
        for name in mixers:
            self.hooks.append(model.undertow[name].register_forward_hook(self._recorder(name)))
        if mixers:
            self.hooks.append(model.register_forward_hook(self._finish))

    def take(self) -> dict[str, float]:
        """What the last watched forward showed, as `gates/MODULE/NAME`; nothing is given twice."""
        found, self.found = self.found, {}
        return found

    def _recorder(self, name: str):
        def record(module: nn.Module, arguments: tuple[Tensor | None, ...], output: Tensor) -> None:
            if arguments[1] is None:  # a memory of zeros, left out: a later sweep mixes one
                return
            self.calls[name] = tuple(x.detach() for x in (*arguments, output) if x is not None)

        return record

    def _finish(self, model, arguments, output) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        values = {
            f"gates/{name}/{key}": value
            for name, tensors in self.calls.items()
            for key, value in statistics(model.undertow[name], *tensors).items()
        }
        self.calls.clear()
        self.found = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}


@torch.no_grad()
def statistics(mixer: nn.Module, x: Tensor, m: Tensor, a: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Scalars that describe one call `y = mixer(x, m, a)`, float32.

    Of each gate (of mixers with `gates(x, m, a)`): `gate_NAME_mean`, `_std`, `_min`, `_max`, and the shares `_closed`
    (below 0.05) and `_open` (above 0.95). `norm_x`, `norm_m`, `norm_out`: mean Euclidean norm of a token's vector. The
    mixer's scalar parameters, under their names.
    """
    values: dict[str, Tensor] = {}
    for gated, value in gates_of(mixer, x, m, a).items():
        name, gate = f"gate_{gated}", value.float()
        values |= {
            f"{name}_mean": gate.mean(),
            f"{name}_std": gate.std(correction=0),
            f"{name}_min": gate.min(),
            f"{name}_max": gate.max(),
            f"{name}_closed": (gate < CLOSED).float().mean(),
            f"{name}_open": (gate > OPEN).float().mean(),
        }
    values |= {f"norm_{name}": t.float().norm(dim=-1).mean() for name, t in (("x", x), ("m", m), ("out", y))}
    scalars = {name: p.float() for name, p in mixer.named_parameters() if p.numel() == 1}
    return values | {name: value.reshape(()) for name, value in scalars.items()}


def gates_of(mixer: nn.Module, x: Tensor, m: Tensor | None, a: Tensor) -> dict[str, Tensor]:
    """The mixer's gates again, without dropout, so that no random number is drawn; none of a mixer that has none.

    Outside autocast: its cache of cast weights must not come to hold any without gradient.
    """
    if not hasattr(mixer, "gates"):  # what a mixer may have, not an option of ours
        return {}
    dtype, training = next(mixer.parameters(), x).dtype, mixer.training
    mixer.eval()
    try:
        with torch.autocast(x.device.type, enabled=False):
            return mixer.gates(x.to(dtype), None if m is None else m.to(dtype), a.to(dtype))  # type: ignore[operator]
    finally:
        mixer.train(training)
