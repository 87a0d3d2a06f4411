"""What a model does along depth and over sweeps while it trains: one look at one row, where it is evaluated anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from undertow.execute import Executor
from undertow.inputs import memory_mask_for, sequence
from undertow.model import UndertowForCausalLM
from undertow.plan import Step
from undertow.schedules import Converge
from undertow.store import write

TINY = 1e-8  # keeps the relative change of an all-zero state finite


class _Watching(Executor):
    """An executor that keeps what every run of a visit returned, and how far that is from what it read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.left: list[tuple[int, Tensor]] = []
        self.change: dict[int, Tensor] = {}  # `_BT`, of a visit's last run at each position

    def _visit(self, step: Step, state, frame, seq, written) -> Tensor:
        y = super()._visit(step, state, frame, seq, written)
        with torch.no_grad():
            x = torch.stack([state[register] for register in step.reads]).sum(0)
            moved_BS = (y - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=TINY)
            self.change[step.index] = write(self.change.get(step.index), moved_BS, frame.positions, 1)
        self.left.append((step.index, y))
        return y


def look(model: UndertowForCausalLM, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of a batch under the training schedule; no parameter's gradient is touched.

    Of visit i (of the unrolled plan): `visit_change_i`, the mean over positions of `|y - x| / |x|` in their last run;
    `visit_gradient_i`, the 2-norm of the loss's gradient at its output, all live runs and positions together (0 where
    none is live). With a memory: `memory_norm`, the mean 2-norm of what a token leaves; `residual`, how far that is
    from the schedule's fixed point, the mean of `|M_t - M*_t| / |M*_t|` with M* of `Converge()`.

    Args:
        batch: `input_ids`, `labels` and whatever else of `undertow.data.collate` the model takes, each `_BT`; pads,
            which the means leave out, are where `attention_mask` is 0.
    """
    given: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
    labels = given.pop("labels", given["input_ids"])
    x_BT, program = given["input_ids"], model.program
    given.setdefault("memory_mask", memory_mask_for(model.time_parts, x_BT, x_BT))
    real_BT = given.get("attention_mask", torch.ones_like(x_BT)).bool()
    with torch.enable_grad():
        watching = _Watching(program, model.view, model.undertow, model.checkpointing)
        trace = watching.run(sequence(model.view, program, **given)[0], model.schedule)
        loss, *_ = model._outputs(trace, labels, 0, None, x_BT.shape[1])
        live = [(index, y) for index, y in watching.left if y.requires_grad]
        found = torch.autograd.grad(loss, [y for _, y in live], allow_unused=True) if loss.requires_grad else ()
    squares = dict.fromkeys((step.index for step in program.steps), 0.0)
    for (index, _), gradient in zip(live, found, strict=False):
        squares[index] += 0.0 if gradient is None else float(gradient.float().square().sum())
    values = {
        f"visit_change_{index}": float(moved_BT[real_BT].mean()) for index, moved_BT in sorted(watching.change.items())
    }
    values |= {f"visit_gradient_{index}": square**0.5 for index, square in squares.items()}
    if trace.memory_BTND is not None:
        with torch.no_grad():
            memory = trace.memory_BTND
            true = model(**given, schedule=Converge(), use_cache=False).memory.reshape(memory.shape)
            far_BTN = (memory - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=TINY)
            norm_BTN = memory.norm(dim=-1)
            values |= {"memory_norm": float(norm_BTN[real_BT].mean()), "residual": float(far_BTN[real_BT].mean())}
    return values
