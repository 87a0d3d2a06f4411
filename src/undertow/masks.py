"""Which keys the queries of a sweep may see.

Where only the distance between query and key counts, the strided subsets of a sequence see the same staircase, each
moved by one key. So one mask of T/G rows serves all G of them, each by a view of its own columns: they would fill T^2
otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Masks:
    """Which keys the queries of a sweep may see: masks, made once per set of positions and window.

    Args:
        T: positions of this call; `past`: cached positions before them.
        documents: `document_BK` over past and present, 0 for pads (None: one document, no pads).
        prefix: `_BT`, True where visits that may read a prefix see each other in both directions (None: nowhere).
    """

    def __init__(self, T: int, past: int, documents: Tensor | None, device: torch.device, prefix: Tensor | None = None):
        self.T, self.past, self.documents, self.device, self.prefix = T, past, documents, device, prefix
        self._made: dict[tuple, Tensor | None] = {}
        self._added: dict[tuple, Tensor | None] = {}
        self._stairs: dict[tuple, Tensor] = {}

    def __call__(self, positions: range, window: int | None, prefix: bool = False) -> Tensor | None:
        """`allowed_B1SK`, or None where plain causal attention (or no restriction at all) says the same."""
        if prefix and self.prefix is not None:
            both = self.prefix[:, positions.start : positions.stop : positions.step, None] & self.prefix[:, None]
            both = both if self.documents is None else both & self._same(positions, self.T)
            return self._causal(positions, self.T, None) | both[:, None]
        keys = self.past + (positions.stop if positions.step == 1 else self.T)
        window = None if window is None or keys <= window else window
        key = (positions, window)
        if key not in self._made:
            self._made[key] = self._make(positions, keys, window)
        return self._made[key]

    def added(self, positions: range, window: int | None, dtype: torch.dtype, causal: bool = False) -> Tensor | None:
        """The same as a number added to the scores, 0 or -inf: what fused attention turns a boolean mask into.

        `causal`: for attention that sees everything without a mask. None is then only what the newest token alone gets.
        """
        key = (positions, window, dtype, causal)
        if key not in self._added:
            allowed = self(positions, window)
            if allowed is None and causal and len(positions) > 1:
                allowed = self._causal(positions, self.past + positions.stop, None)
            if allowed is None:
                self._added[key] = None
            elif self._shared(positions):
                self._added[key] = self._staircase(positions, window, dtype)
            else:
                self._added[key] = _number(allowed, dtype)
        return self._added[key]

    def _same(self, positions: range, keys: int) -> Tensor:
        """`_BSK`: whether query and key lie in the same document."""
        assert self.documents is not None
        queries = slice(self.past + positions.start, self.past + positions.stop, positions.step)
        return self.documents[:, queries, None] == self.documents[:, None, :keys]

    def _make(self, positions: range, keys: int, window: int | None) -> Tensor | None:
        if self.documents is None and window is None:
            whole = self.past == 0 and positions == range(self.T)  # square: the attention's own causal path
            last = positions.step == 1 and len(positions) == 1  # the newest token sees everything
            if whole or last:
                return None
        return self._causal(positions, keys, window)

    def _staircase(self, positions: range, window: int | None, dtype: torch.dtype = torch.bool) -> Tensor:
        """The mask of a strided subset, boolean or a number to add: its columns of the one that all subsets share."""
        G, keys = positions.step, self.past + self.T
        key, plain = (G, window, dtype), (G, window, torch.bool)
        if plain not in self._stairs:
            last_S1 = self.past + G - 1 + torch.arange(0, self.T, G, device=self.device)[:, None]
            # Rows of an odd length: attention that needs aligned rows then copies them, wherever a subset's begin.
            distance_SK = last_S1 - torch.arange((keys + G) | 1, device=self.device)
            self._stairs[plain] = distance_SK >= 0 if window is None else (distance_SK >= 0) & (distance_SK < window)
        if key not in self._stairs:
            self._stairs[key] = _number(self._stairs[plain], dtype)
        first = G - 1 - positions.start
        return self._stairs[key][None, None, : len(positions), first : first + keys]

    def _shared(self, positions: range) -> bool:
        """Whether a staircase says what these positions see."""
        return self.documents is None and positions.start < positions.step > 1

    def _causal(self, positions: range, keys: int, window: int | None) -> Tensor:
        if self._shared(positions):
            return self._staircase(positions, window)
        q_S1 = self.past + torch.arange(positions.start, positions.stop, positions.step, device=self.device)[:, None]
        k_1K = torch.arange(keys, device=self.device)[None]
        allowed = (k_1K <= q_S1)[None]
        if window is not None:
            allowed = allowed & (q_S1 - k_1K < window)
        if self.documents is not None:
            allowed = allowed & self._same(positions, keys)
        return allowed[:, None]


def _number(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where allowed, else -inf."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
