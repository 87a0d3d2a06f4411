"""What Hugging Face's tools ask of a model beside forward and generation, answered for a backbone run by a plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from undertow import card
from undertow.backbone import Backbone
from undertow.backbone.attention import kind_of
from undertow.config import UndertowConfig
from undertow.future import FutureHeads
from undertow.headless import Decoder
from undertow.in_memory import announce, model_at

__all__ = ["Outside"]


class Outside(PreTrainedModel):
    """The side of `UndertowForCausalLM` that trainers, adapters, loaders and savers see."""

    config_class = UndertowConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the backbone's own class decides
    main_input_name = "input_ids"
    _tied_weights_keys = {}  # type: ignore[var-annotated]  # the backbone has its own; tools look there if this is a dict

    backbone: PreTrainedModel
    view: Backbone
    undertow: nn.ModuleDict
    checkpointing: bool

    def _init_weights(self, module: nn.Module):
        """Modules initialise themselves; there is nothing to add."""

    def __setstate__(self, state):
        super().__setstate__(state)
        announce(self)  # a copy is a model of its own

    # ------------------------------------------------------------------ parts

    @property
    def base_model(self):
        """The model without its LM head, recurrence and all (not the bare backbone)."""
        return Decoder(self)

    def get_input_embeddings(self):
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The backbone's LM head."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        """Replace the backbone's LM head."""
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As Hugging Face; heads that predict tokens further ahead get the new vocabulary, too."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if "future" in self.undertow:
            for head in cast(FutureHeads, self.undertow["future"]).heads:
                assert isinstance(head, nn.Sequential)
                last = cast(nn.Linear, head[-1])
                head[-1] = self._get_resized_lm_head(last, len(embeddings.weight), mean_resizing=mean_resizing)
        return embeddings

    # ------------------------------------------------------------------ switches

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        """Hugging Face's switch, for the backbone. Raises ValueError for one that the backbone cannot run with."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        kind_of(self.config._attn_implementation, self.view.family.ours)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        """Recompute each visit in backward. The layers' own switch would drop keys and values, so this is ours."""
        self.checkpointing = True

    def gradient_checkpointing_disable(self):
        """Keep what visits compute for backward."""
        self.checkpointing = False

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether visits are recomputed in backward."""
        return self.checkpointing

    is_gradient_checkpointing = is_activation_checkpointing

    # ------------------------------------------------------------------ saving and loading

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As Hugging Face, and a model card. Raises ValueError for a quantised backbone: no plain tensors."""
        if getattr(self.backbone, "is_quantized", False):  # a flag only Hugging Face's quantisers set
            raise ValueError(
                "the backbone is quantised and cannot be saved with what is new: save model.undertow.state_dict() and "
                "wrap the quantised backbone again, or wrap plain weights"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        card.leave(Path(save_directory), self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As Hugging Face; given the name of a model in memory (`undertow.in_memory`), a copy of that."""
        model = model_at(pretrained_model_name_or_path)
        if model is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        weights = {name: x.detach().clone() for name, x in model.state_dict().items()}
        other = super().from_pretrained(None, *args, **{"config": model.config, **kwargs}, state_dict=weights)
        other.generation_config, other.schedule = copy.deepcopy(model.generation_config), model.schedule
        return other
