"""Future-token prediction: heads on one layer's state that predict tokens further ahead (FTP, arXiv 2607.15178).

Head j predicts the token j + 2 positions on; the next token stays the LM head's business. The published set-up trains
the heads alone, on a frozen trunk (`training.train_only: undertow.future`), to measure how much of the coming tokens a
state already holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FutureHeads(nn.Module):
    """H heads: `layers - 1` times Linear and SiLU, then a Linear to the vocabulary.

    Args:
        width, vocabulary: D and V.
        heads: how many; head j predicts token t + 2 + j from the state at t.
        layers: of each head, 1 or more (hidden width D).
        source: the layer whose last output they read, before the final norm (negatives from the end).
        weights: of the heads' losses (None: equal); the losses' weighted mean is added to the model's loss.
        trunk: what the ordinary next-token loss is multiplied by (0: heads alone, as published).
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        heads: int = 4,
        layers: int = 2,
        source: int = -1,
        weights: list[float] | None = None,
        trunk: float = 0.0,
    ):
        super().__init__()
        for name, value in (("heads", heads), ("layers", layers)):
            if value < 1:
                raise ValueError(f"future {name}={value}: must be at least 1")
        if weights is not None and (len(weights) != heads or min(weights) < 0 or sum(weights) == 0):
            raise ValueError(f"future weights={weights}: must be {heads} non-negative numbers, one a head")
        self.source, self.trunk = source, trunk
        self.weights = [1.0] * heads if weights is None else list(weights)
        self.heads = nn.ModuleList()
        for _ in range(heads):
            body = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.SiLU())]
            self.heads.append(nn.Sequential(*body, nn.Linear(width, vocabulary)))

    @classmethod
    def of(cls, settings: Mapping, width: int, vocabulary: int) -> FutureHeads:
        """The heads that settings from a config or a recipe say. Raises ValueError for an unknown field."""
        allowed = [name for name in signature(cls).parameters if name not in ("width", "vocabulary")]
        for name in settings:
            if name not in allowed:
                raise ValueError(f"future has no field {name!r}; allowed are {allowed}")
        return cls(width, vocabulary, **settings)

    def forward(self, h_BTD: Tensor) -> list[Tensor]:
        """Logits of every head, each `_BTV`."""
        return [head(h_BTD) for head in self.heads]

    def losses(self, h_BTD: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One cross-entropy a head, `_H`, in nats a token: head j at t against `labels[t + 2 + j]` (-100: ignored).

        With `num_items_in_batch` (of gradient accumulation) each is divided by that, else by its own label count.
        """
        found = []
        for j, head in enumerate(self.heads):
            targets = labels[:, j + 2 :]
            scores = head(h_BTD[:, : max(0, labels.shape[1] - j - 2)])
            scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
            total = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
            found.append(
                total / ((targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
            )
        return torch.stack(found)

    def together(self, losses: Tensor) -> Tensor:
        """Their weighted mean."""
        weights = losses.new_tensor(self.weights)
        return (weights * losses).sum() / weights.sum()
