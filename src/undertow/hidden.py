"""The states between the visits of a forward: `output_hidden_states`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from undertow.backbone import Backbone
from undertow.edges import Program
from undertow.execute import Executor
from undertow.frames import Frame, Sequence
from undertow.plan import NORM, Step
from undertow.store import Written, write

__all__ = ["Recording"]


class Recording(Executor):
    """An executor that keeps what every visit wrote, each position from the last sweep that came there."""

    def __init__(self, program: Program, backbone: Backbone, modules: nn.ModuleDict, checkpoint: bool = False):
        super().__init__(program, backbone, modules, checkpoint)
        self.written: dict[int, Tensor] = {}

    def _visit(self, step: Step, state: Mapping, frame: Frame, seq: Sequence, written: Written) -> Tensor:
        y = super()._visit(step, state, frame, seq, written)
        self.written[step.index] = write(self.written.get(step.index), y, frame.positions, 1)
        return y

    def states(self, seq: Sequence, last_BTD: Tensor) -> tuple[Tensor, ...]:
        """`_BTD` each: the embeddings, what each visit of a layer or block wrote but the last, and what the head reads.

        Of a plan that visits each layer once these are Hugging Face's own.
        """
        visits = [step.index for step in self.program.steps if step.block != NORM]
        return (seq.x_BTD, *(self.written[index] for index in visits[:-1]), last_BTD)
