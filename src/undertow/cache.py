"""The state of generation between calls: keys and values of every slot, and the memory beside them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from undertow.store import KV, Written

__all__ = ["Place", "Room", "Slot", "UndertowCache"]


class Slot(DynamicLayer):
    """Keys and values of one slot, `k_BGTE`. Sliding-window layers keep all of them and mask: cropping stays exact."""

    keys: Tensor
    values: Tensor

    def set(self, keys: Tensor, values: Tensor):
        """Hold these, `_BGTE`, instead of what was held."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


class UndertowCache(Cache):
    """The state of generation: one `Slot` a visit's slot, and the memory beside them.

    Every operation generation performs on a batch (reordering beams, expanding, selecting, offloading) moves the
    memory with the keys and values. `memory_BND` is what the newest token left behind; `documents_BT` names the
    document of every cached token (0: pad) and is None while there is one document and no pad. `masked`: a caller's
    `memory_mask` said where the first tokens take the memory in, so that it is the method's affair at later ones.

    A cache that is to be cut (`crop`: assisted and prompt-lookup decoding) must know what every kept token left behind:
    after `activate_past_recording` it keeps `history_BTND`, the memories from that token on.
    """

    layers: list[Slot]  # type: ignore[assignment]  # Hugging Face lists a union of all its layer classes

    def __init__(self, slots: tuple[str, ...]):
        super().__init__(layers=[Slot() for _ in slots])
        self.slots = slots
        self.memory_BND: Tensor | None = None
        self.history_BTND: Tensor | None = None
        self.recording = False
        self.documents_BT: Tensor | None = None
        self.masked = False
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def past(self) -> dict[str, KV]:
        """slot -> keys and values so far (empty before the first token)."""
        if self.length == 0:
            return {}
        return {s: (layer.keys, layer.values) for s, layer in zip(self.slots, self.layers, strict=True)}

    def activate_past_recording(self):
        """Keep what every token leaves behind, from the newest one on, so that later ones can be cut off again."""
        super().activate_past_recording()
        if not self.recording and self.memory_BND is not None:
            self.history_BTND = self.memory_BND[:, None]
        self.recording = True

    def commit(self, written: Written, memory_BTND: Tensor | None, documents_BT: Tensor | None, length: int):
        """Take over what a call computed for `length` more tokens."""
        past = self.past()
        for slot, layer in zip(self.slots, self.layers, strict=True):
            (k, v), full = written[slot]
            if past and full is None:
                full = torch.cat([past[slot][0], k], 2), torch.cat([past[slot][1], v], 2)
            layer.set(*(full or (k, v)))
        self.documents_BT = documents_BT
        self.length += length
        if memory_BTND is None:
            return
        self.memory_BND = memory_BTND[:, -1]
        if self.recording:
            known = [] if self.history_BTND is None else [self.history_BTND]
            self.history_BTND = torch.cat([*known, memory_BTND], 1)

    def _move(self, change):
        self.memory_BND = None if self.memory_BND is None else change(self.memory_BND)
        self.history_BTND = None if self.history_BTND is None else change(self.history_BTND)
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
        self.memory_BND, self.history_BTND, self.documents_BT, self.masked, self.length = None, None, None, False, 0

    def crop(self, tokens_to_remove: int):
        """Cut off the newest `-tokens_to_remove` tokens: everything is as if they had not been.

        Raises:
            ValueError: more tokens than there are, or than memories were recorded for.
        """
        kept = self.length + tokens_to_remove
        if tokens_to_remove > 0 or kept < 0:
            raise ValueError(f"crop({tokens_to_remove}): allowed are {-self.length} to 0 (minus the tokens to cut off)")
        if tokens_to_remove and self.memory_BND is not None:
            known = 0 if self.history_BTND is None else self.history_BTND.shape[1]
            left = max(0, known + tokens_to_remove)
            if kept and not left:
                raise ValueError(
                    f"crop({tokens_to_remove}): the memories of {known} tokens are recorded; to cut tokens off, call "
                    "activate_past_recording() before they are read"
                )
            self.history_BTND = None if self.history_BTND is None or not left else self.history_BTND[:, :left]
            self.memory_BND = None if self.history_BTND is None else self.history_BTND[:, -1]
        super().crop(tokens_to_remove)
        self.length = kept
        self.documents_BT = None if self.documents_BT is None else self.documents_BT[:, :kept]


class Room:
    """A cache's keys and values with room at their end, so that a new token's are written and nothing is copied.

    From `__init__` to `release` the cache itself is out of date. All new tokens are real and go on with their row's
    newest document.

    Args:
        cache: of at least one token.
        most: new tokens at most; `least`: how many there is room for at once (it doubles when that is used up).
        additive: masks as numbers to add to scores, not as booleans.
    """

    def __init__(self, cache: UndertowCache, most: int, least: int, additive: bool):
        self.cache, self.longest, self.length = cache, cache.length + most, cache.length
        self.buffers = {slot: kv for slot, kv in cache.past().items()}
        self.places: list[Place] = []
        self.newest_B1: Tensor | None = None
        self.allowed_B11K: Tensor | None = None
        self.capacity = cache.length
        documents = cache.documents_BT
        if documents is not None:
            self.newest_B1 = documents.amax(1, keepdim=True).clamp(min=1)
            allowed = documents == self.newest_B1
            if additive:
                dtype = cache.layers[0].keys.dtype
                allowed = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
                    ~allowed, -torch.inf
                )
            self.allowed_B11K = allowed[:, None, None]
        self._grow(max(least, cache.length))

    def _grow(self, more: int):
        self.capacity = min(self.capacity + more, self.longest)
        with torch.inference_mode(False), torch.no_grad():  # what outlives the loop must not be made in that mode
            for slot, (k, v) in self.buffers.items():
                self.buffers[slot] = self._roomy(k, 2), self._roomy(v, 2)
            if self.allowed_B11K is not None:
                fill = 1 if self.allowed_B11K.dtype == torch.bool else 0
                self.allowed_B11K = self._roomy(self.allowed_B11K, 3)
                self.allowed_B11K[..., self.length :] = fill
        for place in self.places:
            place.keys, place.values = self.buffers.get(place.slot, (None, None))

    def _roomy(self, x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = self.capacity
        new = x.new_empty(shape)
        new.narrow(dim, 0, self.length).copy_(x.narrow(dim, 0, self.length))
        return new

    def place(self, slot: str, window: int | None, shares: bool) -> Place:
        """What a visit gets in place of its cache."""
        self.places.append(Place(self, slot, window, shares))
        return self.places[-1]

    def advance(self):
        """Make way for one more token."""
        if self.length == self.capacity:
            assert self.length < self.longest, "no more tokens than were announced"
            self._grow(self.capacity)
        self.length += 1
        if self.allowed_B11K is not None:
            masks: dict[int, Tensor] = {}
            for place in self.places:
                first = place.first
                if first not in masks:
                    masks[first] = self.allowed_B11K.narrow(3, first, self.length - first)
                place.mask = masks[first]

    def release(self):
        """Hand everything to the cache."""
        cache, new = self.cache, self.length - self.cache.length
        for slot, layer in zip(cache.slots, cache.layers, strict=True):
            layer.set(*(x.narrow(2, 0, self.length) for x in self.buffers[slot]))
        if cache.documents_BT is not None and self.newest_B1 is not None:
            cache.documents_BT = torch.cat([cache.documents_BT, self.newest_B1.expand(-1, new)], 1)
        cache.length = self.length


class Place:
    """What one visit gets in place of its cache while tokens come one by one (`store.View` is for whole sequences).

    `shares`: only read the slot, and discard the visit's own keys and values. A slot that nothing keeps (`""`) shows
    the visit its own token alone. Keys before a `window` are cut off, not masked.
    """

    def __init__(self, room: Room, slot: str, window: int | None, shares: bool):
        self.room, self.slot, self.window, self.shares = room, slot, window, shares
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.keys, self.values = room.buffers.get(slot, (None, None))
        self.mask: Tensor | None = None

    @property
    def first(self) -> int:
        """The first key that the newest token sees."""
        return 0 if self.window is None else max(0, self.room.length - self.window)

    def update(self, k_BG1E: Tensor, v_BG1E: Tensor, *args, **kwargs) -> KV:
        """Write the newest token's keys and values; return all that it may see."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            return k_BG1E, v_BG1E
        end, first = self.room.length, self.first
        if not self.shares:
            keys.narrow(2, end - 1, 1).copy_(k_BG1E)
            values.narrow(2, end - 1, 1).copy_(v_BG1E)
        return keys.narrow(2, first, end - first), values.narrow(2, first, end - first)
