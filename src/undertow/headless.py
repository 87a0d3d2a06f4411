"""The model without its LM head: what trainers ask for that compute a loss of their own from the last states."""

from __future__ import annotations

from typing import Any

import torch

OURS = {f"{what}_checkpointing_{switch}" for what in ("gradient", "activation") for switch in ("enable", "disable")}


class Decoder:
    """`model.base_model`: called like the model, it returns `last_hidden_state`, `_BTD`, which the LM head reads.

    The states are the recurrence's own, each position from the last sweep that wrote it, so a loss on them is that of a
    schedule with `loss="last"`. (TRL's trainers multiply them by the LM head themselves and never see our loss.)
    The switches of checkpointing are the model's. Everything else that is asked of a base model is asked of the
    backbone.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        nowhere = torch.zeros(0, dtype=torch.long)  # the positions whose logits are wanted
        return type(self.model).forward(self.model, *args, logits_to_keep=nowhere, **kwargs)

    def get_decoder(self) -> Decoder:
        """Itself: the backbone's decoder is without the recurrence."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model if name in OURS else self.model.backbone, name)
