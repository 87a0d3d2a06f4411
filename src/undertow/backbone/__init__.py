"""How each model family is seen as `embed -> layers -> norm -> head`."""

from undertow.backbone.adapter import Backbone, Shape, tapped
from undertow.backbone.families import FAMILIES, Family, Tap, family_of
from undertow.backbone.llama import UndertowLlamaConfig, UndertowLlamaForCausalLM
from undertow.backbone.nanochat import UndertowNanoChatConfig, UndertowNanoChatForCausalLM

__all__ = [
    "FAMILIES",
    "Backbone",
    "Family",
    "Shape",
    "Tap",
    "UndertowLlamaConfig",
    "UndertowLlamaForCausalLM",
    "UndertowNanoChatConfig",
    "UndertowNanoChatForCausalLM",
    "family_of",
    "tapped",
]
