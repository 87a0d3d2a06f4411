"""An exponential moving average of the parameters (of those alone: the puzzles' vectors are used as they are)."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA:
    """`average <- decay average + (1 - decay) parameter` at every `update`."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in model.parameters()], 1 - self.decay)

    @torch.no_grad()
    def averaged(self, model: M) -> M:
        """A copy of the model with the averages for its parameters, in `eval()` mode."""
        made = copy.deepcopy(model).eval()
        for name, parameter in made.named_parameters():
            parameter.copy_(self.average[name])
        return made
