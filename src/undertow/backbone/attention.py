"""Which attention runs inside a layer (Hugging Face's `attn_implementation`), and which masks it takes.

`sdpa` takes any mask, and none at all means causal. `eager` and `flex_attention` add their mask to the scores, and
none at all means that everything is seen. Flash attention and kernels of the hub take no mask of ours: they run where
there is none (sweeps over whole texts, one new token), and `sdpa` runs in all other calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.hub_kernels import is_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Kind = Literal["sdpa", "added", "unmasked"]


def kind_of(name: str, ours: bool) -> Kind:
    """What masks an attention implementation takes; one that takes none hands calls with a mask to `sdpa` from now on.

    Args:
        ours: the family's attention is our own code, which is `sdpa` alone.

    Raises:
        ValueError: an implementation whose masks are not known here.
    """
    if name == "sdpa":
        return "sdpa"
    flash = "flash" in name or is_kernel(name)
    if ours or not (flash or name in ("eager", "flex_attention")):
        known = "allowed are 'sdpa', 'eager', 'flex_attention', flash attention and kernels of the hub"
        raise ValueError(f"attn_implementation={name!r}: " + ("only 'sdpa' is supported" if ours else known))
    if not flash:
        return "added"
    whole = ALL_ATTENTION_FUNCTIONS[name]
    if not isinstance(whole, _Unmasked):
        AttentionInterface.register(name, _Unmasked(whole))
    return "unmasked"


def attend(model: PreTrainedModel, name: str | None) -> None:
    """Choose the attention of a recipe (None: leave it). Raises ValueError, one line, where it cannot be had."""
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError, OSError) as error:
        raise ValueError(f"backbone.attn_implementation: {' '.join(str(error).split())}") from error


def warn_of(name: str) -> None:
    """Say, once, that an attention without masks does not run everywhere."""
    warnings.warn(
        f"attn_implementation={name!r} takes no masks: sweeps over parts of a text, pads, packed documents and sliding "
        "windows go through 'sdpa'",
        stacklevel=3,
    )


class _Unmasked:
    """An attention function that takes no mask of scores; calls that have one go through `sdpa`."""

    def __init__(self, whole: Callable):
        self.whole = whole

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **keywords):
        if attention_mask is None or attention_mask.dim() < 4:  # below 4: Hugging Face's own mask of pads
            return self.whole(module, query, key, value, attention_mask, **keywords)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
