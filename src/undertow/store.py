"""Where keys and values live during a forward, differentiable.

A slot's keys and values are plain tensors `k_BGTE, v_BGTE` that go into a visit and come out of it, so autograd,
checkpointing and sweeps over subsets need nothing special. A `View` stands in for the Hugging Face cache inside one
layer call. Between calls they live in `cache.UndertowCache`, with the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

KV = tuple[Tensor, Tensor]
Written = dict[str, tuple[KV, KV | None]]  # slot -> its buffer over this call, and past + buffer where a visit made it


def write(buffer: Tensor | None, new: Tensor, positions: range, dim: int) -> Tensor:
    """`buffer` with `new` at `positions` of `dim` (a new tensor: earlier readers keep what they saw)."""
    held = 0 if buffer is None else buffer.shape[dim]
    if positions.step == 1 and positions.start == held:
        return new if buffer is None else torch.cat([buffer, new], dim)
    if positions.step == 1 and positions.start == 0 and len(positions) == held:
        return new
    assert buffer is not None, "the first positions written are a block from 0"
    return torch.slice_scatter(buffer, new, dim, positions.start, positions.stop, positions.step)


def overwrite(buffer: Tensor | None, new: Tensor, positions: range, dim: int) -> Tensor:
    """As `write`, in place: for a buffer that nobody, no graph either, still reads as it was."""
    if buffer is None or positions.stop > buffer.shape[dim]:
        return write(buffer, new, positions, dim)
    buffer.transpose(0, dim)[positions.start : positions.stop : positions.step] = new.transpose(0, dim)
    return buffer


def take(buffer: Tensor, positions: range) -> Tensor:
    """Rows `positions` of dimension 1: a view, or the buffer itself if that is all of it."""
    if len(positions) == buffer.shape[1]:
        return buffer
    return buffer[:, positions.start : positions.stop : positions.step]


class Filled(Exception):
    """A view asked for keys and values only has them: the rest of the layer call is not needed."""


class View:
    """What one layer call gets in place of its cache: it knows the visit's slot, whatever `layer_idx` the layer says.

    `past` are keys and values of the tokens before this call, `current` the slot's buffer over this call's positions so
    far (None: there are none); `positions` those the visit computes. `shares`: only read the slot, and discard the
    visit's own. `only`: the caller wants nothing but keys and values, so `update` raises `Filled`. `put`: `write`, or
    `overwrite`.

    After the call, `current` is the new buffer and `full` past and present together, where there is a past.
    """

    def __init__(
        self, past: KV | None, current: KV | None, positions: range, shares: bool, only: bool = False, put=write
    ):
        self.past, self.current, self.positions, self.shares = past, current, positions, shares
        self.only, self.put = only, put
        self.full: KV | None = None

    def update(self, k_BGSE: Tensor, v_BGSE: Tensor, *args, **kwargs) -> KV:
        """Put these keys and values at the visit's positions; return all that its queries may see."""
        if not self.shares:
            k, v = self.current or (None, None)
            self.current = self.put(k, k_BGSE, self.positions, 2), self.put(v, v_BGSE, self.positions, 2)
        if self.only:
            raise Filled
        assert self.current is not None, "a slot is written before it is shared"
        k, v = self.current
        if self.positions.step == 1 and self.positions.stop < k.shape[2]:  # a block: nothing after it is visible
            k, v = k[:, :, : self.positions.stop], v[:, :, : self.positions.stop]
        if self.past is None:
            return k, v
        self.full = torch.cat([self.past[0], k], 2), torch.cat([self.past[1], v], 2)
        return self.full
