"""Where keys, values and the memory live: during a sequence (differentiable) and between calls (a generation cache).

During a forward, a slot's keys and values are plain tensors `k_BGTE, v_BGTE` that go into a visit and come out of it,
so autograd, checkpointing and sweeps over subsets need nothing special. A `View` stands in for the Hugging Face cache
inside one layer call. Between calls, `UndertowCache` holds every slot and the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

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


def take(buffer: Tensor, positions: range) -> Tensor:
    """Rows `positions` of dimension 1: a view, or the buffer itself if that is all of it."""
    if len(positions) == buffer.shape[1]:
        return buffer
    return buffer[:, positions.start : positions.stop : positions.step]


class View:
    """What one layer call gets in place of its cache: it knows the visit's slot, whatever `layer_idx` the layer says.

    Args:
        past: keys and values of the tokens before this call, from the generation cache (None: there are none).
        current: the slot's buffer over this call's positions so far (None: never written).
        positions: the positions the visit computes.
        shares: only read the slot, and discard the visit's own keys and values.

    After the call, `current` is the new buffer and `full` past and present together, where there is a past.
    """

    def __init__(self, past: KV | None, current: KV | None, positions: range, shares: bool):
        self.past, self.current, self.positions, self.shares = past, current, positions, shares
        self.full: KV | None = None

    def update(self, k_BGSE: Tensor, v_BGSE: Tensor, *args, **kwargs) -> KV:
        """Put these keys and values at the visit's positions; return all that its queries may see."""
        if not self.shares:
            k, v = self.current or (None, None)
            self.current = write(k, k_BGSE, self.positions, dim=2), write(v, v_BGSE, self.positions, dim=2)
        assert self.current is not None, "a slot is written before it is shared"
        k, v = self.current
        if self.positions.step == 1 and self.positions.stop < k.shape[2]:  # a block: nothing after it is visible
            k, v = k[:, :, : self.positions.stop], v[:, :, : self.positions.stop]
        if self.past is None:
            return k, v
        self.full = torch.cat([self.past[0], k], 2), torch.cat([self.past[1], v], 2)
        return self.full


class Masks:
    """Which keys the queries of a sweep may see: boolean masks, made once per set of positions and window.

    Args:
        T: positions of this call; `past`: cached positions before them.
        documents: `document_BK` over past and present, 0 for pads (None: one document, no pads).
    """

    def __init__(self, T: int, past: int, documents: Tensor | None, device: torch.device):
        self.T, self.past, self.documents, self.device = T, past, documents, device
        self._made: dict[tuple, Tensor | None] = {}

    def __call__(self, positions: range, window: int | None) -> Tensor | None:
        """`allowed_B1SK`, or None where plain causal attention (or no restriction at all) says the same."""
        keys = self.past + (positions.stop if positions.step == 1 else self.T)
        window = None if window is None or keys <= window else window
        key = (positions, window)
        if key not in self._made:
            self._made[key] = self._make(positions, keys, window)
        return self._made[key]

    def _make(self, positions: range, keys: int, window: int | None) -> Tensor | None:
        if self.documents is None and window is None:
            whole = self.past == 0 and positions == range(self.T)  # square: the attention's own causal path
            last = positions.step == 1 and len(positions) == 1  # the newest token sees everything
            if whole or last:
                return None
        q_S1 = self.past + torch.arange(positions.start, positions.stop, positions.step, device=self.device)[:, None]
        k_1K = torch.arange(keys, device=self.device)[None]
        allowed = (k_1K <= q_S1)[None]
        if window is not None:
            allowed = allowed & (q_S1 - k_1K < window)
        if self.documents is not None:
            allowed = allowed & (self.documents[:, q_S1[:, 0], None] == self.documents[:, None, :keys])
        return allowed[:, None]


class Slot(DynamicLayer):
    """Keys and values of one slot, `k_BGTE`. Sliding-window layers keep all of them and mask: cropping stays exact."""

    keys: Tensor
    values: Tensor

    def set(self, keys: Tensor, values: Tensor):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


class UndertowCache(Cache):
    """The state of generation: one `Slot` a visit's slot, and the memory beside them.

    Every operation generation performs on a batch (reordering beams, expanding, selecting, offloading) moves the
    memory with the keys and values. `memory_BND` is what the newest token left behind; `documents_BT` names the
    document of every cached token (0: pad) and is None while there is one document and no pad.
    """

    layers: list[Slot]  # type: ignore[assignment]  # Hugging Face lists a union of all its layer classes

    def __init__(self, slots: tuple[str, ...]):
        super().__init__(layers=[Slot() for _ in slots])
        self.slots = slots
        self.memory_BND: Tensor | None = None
        self.documents_BT: Tensor | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def past(self) -> dict[str, KV]:
        """slot -> keys and values so far (empty before the first token)."""
        if self.length == 0:
            return {}
        return {s: (layer.keys, layer.values) for s, layer in zip(self.slots, self.layers, strict=True)}

    def commit(self, written: Written, memory_BND: Tensor | None, documents_BT: Tensor | None, length: int):
        """Take over what a call computed for `length` more tokens."""
        past = self.past()
        for slot, layer in zip(self.slots, self.layers, strict=True):
            (k, v), full = written[slot]
            if past and full is None:
                full = torch.cat([past[slot][0], k], 2), torch.cat([past[slot][1], v], 2)
            layer.set(*(full or (k, v)))
        self.memory_BND, self.documents_BT = memory_BND, documents_BT
        self.length += length

    def _move(self, change):
        self.memory_BND = None if self.memory_BND is None else change(self.memory_BND)
        self.documents_BT = None if self.documents_BT is None else change(self.documents_BT)

    def reorder_cache(self, beam_idx: torch.LongTensor):
        super().reorder_cache(beam_idx)
        self._move(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self._move(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        self._move(lambda x: x[indices])

    def reset(self):
        super().reset()
        self.memory_BND, self.documents_BT, self.length = None, None, 0

    def crop(self, tokens_to_remove: int):
        """Cutting tokens off needs the memory of every kept token, which is not recorded."""
        if tokens_to_remove == 0:
            return
        if self.memory_BND is not None:
            raise ValueError(
                f"crop({tokens_to_remove}): a cache that holds a memory cannot be cut, since earlier memories are not "
                "recorded; assisted decoding is not supported yet"
            )
        super().crop(tokens_to_remove)
        self.length -= abs(tokens_to_remove)
        self.documents_BT = None if self.documents_BT is None else self.documents_BT[:, : self.length]
