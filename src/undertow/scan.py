"""The carries run along a whole text, `M_t = U(source_t, M_{t-1})`, with the sources as they stand.

A carry is a memory of its own: T2MLR's cache residual forgets so slowly that k sweeps truncate it at about k tokens
(k G with subsets). It needs no layers, so between sweeps it is simply run to the end: T steps on vectors of width D,
which cost little beside one layer, and what the layers still have to settle is short again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from undertow.edges import output_of

if TYPE_CHECKING:
    from undertow.execute import Executor
    from undertow.frames import Sequence


def normed(m: Tensor, eps: float | None) -> Tensor:
    """What is carried of a source: its weightless RMS norm, or (None) the source itself."""
    return m if eps is None else F.rms_norm(m, m.shape[-1:], eps=eps)


def settled(executor: Executor, state: Mapping[str, Tensor], seq: Sequence) -> Tensor:
    """The memories `M_BTND` that the sources in `state`, over all positions, leave behind."""
    found = []
    for n, (source, norm, carry) in enumerate(executor.program.memories):
        h_BTD = normed(state[output_of(source)], norm)
        found.append(_run(executor.modules[carry], h_BTD, seq.entry_BND[:, n : n + 1], seq) if carry else h_BTD)
    m_BTND = torch.stack(found, 2)
    return m_BTND if seq.real_BT is None else m_BTND * seq.real_BT[..., None, None]


def _run(carry, h_BTD: Tensor, before_B1D: Tensor, seq: Sequence) -> Tensor:
    left = []
    for t, h in enumerate(h_BTD.split(1, 1)):
        if seq.inside_BT is not None:
            before_B1D = before_B1D * seq.inside_BT[:, t, None, None]
        new = carry(h, before_B1D)
        if seq.memory_mask_BT is not None:
            new = torch.where(seq.memory_mask_BT[:, t, None, None], new, h)
        before_B1D = new if seq.real_BT is None else new * seq.real_BT[:, t, None, None]
        left.append(new)
    return torch.cat(left, 1)
