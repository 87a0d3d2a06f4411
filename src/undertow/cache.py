"""The state of generation between calls: keys and values of every slot, and the memory beside them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from undertow.store import KV, Written


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
