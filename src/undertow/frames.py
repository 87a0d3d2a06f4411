"""What the executor is given and what it gives back: a sequence, the frame of one sweep, read-outs, a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from undertow.backbone.adapter import Context
from undertow.masks import Masks
from undertow.store import KV, Written, write

__all__ = ["Frame", "Readout", "Sequence", "Trace"]


@dataclass(frozen=True)
class Sequence:
    """What stays the same during a forward."""

    x_BTD: Tensor  # embeddings
    context: Context  # what layers get beside the states
    masks: Masks
    past: Mapping[str, KV]  # slot -> keys and values before this call
    entry_BND: Tensor  # the memory left by the token before the first (zeros at the start of a text)
    real_BT: Tensor | None = None  # False at pads, which leave zero memory (None: no pads)
    inside_BT: Tensor | None = None  # False where a document starts, which reads zero memory (None: none starts here)
    memory_mask_BT: Tensor | None = None  # False where delay-1 targets stay unmixed (None: nowhere)
    begins: bool = False  # no token came before this call, so that `entry_BND` is known to be zero

    @property
    def everywhere(self) -> range:
        """All positions of this call."""
        return range(self.x_BTD.shape[1])


@dataclass(frozen=True)
class Frame:
    """What one sweep sees: its positions, the memory entering them, and where that may be mixed in.

    `mixed=False`: nowhere. `zero`: the memory is known to be zero everywhere, so that one row of it says all.
    `unread`: and nobody needs to read that where it changes nothing. `put`: how keys and values get into their buffers,
    by `write` or `overwrite`.
    """

    positions: range
    memory_BSND: Tensor | None
    mask_BS: Tensor | None
    carried: dict[tuple, Tensor] = field(default_factory=dict)  # projected memories, made once per sweep
    entered: dict[int, tuple] | None = None  # step -> its input and what edges brought it, if a refresh needs them
    mixed: bool = True
    zero: bool = False
    unread: bool = False
    put: Callable = field(default_factory=lambda: write)


@dataclass(frozen=True)
class Readout:
    """Normed states `h_BSD` of one read-out, their positions, the weight of their loss, and what is watched."""

    h_BSD: Tensor
    positions: range
    weight: float
    watched_BSD: Tensor | None = None


@dataclass(frozen=True)
class Trace:
    """What a schedule computed."""

    readouts: tuple[Readout, ...]
    memory_BTND: Tensor | None
    written: Written
    passes: float  # cost of the sweeps, in passes of the span over all positions
    residual: float | None
    rounds_BT: Tensor | None = None  # how many rounds of a loop each token took, where a rule decided
