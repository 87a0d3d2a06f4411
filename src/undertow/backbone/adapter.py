"""A Hugging Face causal LM seen as `embed -> layers -> norm -> head`, its layers unpatched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from undertow.backbone.attention import Kind, kind_of, warn_of
from undertow.backbone.families import Tap, family_of
from undertow.masks import Masks
from undertow.store import take
from undertow.versions import cache_keyword

Context = Mapping[str, Tensor | tuple[Tensor, ...]]
Port = Callable[[Tensor, Tensor], Tensor]  # (projected_BSK, projection input a_BSD) -> projected_BSK

# What the taps of the layer now running add: {id(projection): [(tap, heads, port), ...]}. The executor sets it around
# each layer call; it is the only forward state that is not an argument.
_PORTS: ContextVar[dict[int, list[tuple[Tap, int, Port]]] | None] = ContextVar("undertow_ports", default=None)


@dataclass(frozen=True)
class Shape:
    """Sizes of a backbone: L layers, width D, H query heads, G key/value heads, head width E; the eps of its norms."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float = 1e-6

    @property
    def kv_width(self) -> int:
        """Width of the keys of all heads together, G E."""
        return self.kv_heads * self.head_width

    def layer(self, number: int, name: str) -> int:
        """A layer number with negatives counted from the end. Raises ValueError naming the argument."""
        if not -self.layers <= number < self.layers:
            raise ValueError(f"{name}={number}: the model has {self.layers} layers, 0..{self.layers - 1} (or negative)")
        return number % self.layers


NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")  # what configs call the eps of their norms


def shape_of(config) -> Shape:
    """The sizes in a Hugging Face config (its attribute_map covers GPT-2's own names).

    Raises ValueError for heads that no whole number of key/value heads shares.
    """
    heads = config.num_attention_heads
    # Optional fields of foreign configs: not every family has grouped heads or a free head width.
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:  # the layers themselves would only fail when they run
        raise ValueError(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    named = [getattr(config, name) for name in NORM_EPS if hasattr(config, name)]
    return Shape(config.num_hidden_layers, config.hidden_size, heads, kv_heads, head_width, *named[:1])


def _tap_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a tapped projection."""
    return mix_taps(module, args[0], output)


def mix_taps(module: nn.Module, a_BSD: Tensor, output: Tensor) -> Tensor:
    """Add what the executor asks for to a projection's output, in the declared slices only; `a_BSD`: its input."""
    ports = _PORTS.get()
    for tap, heads, port in (ports or {}).get(id(module), ()):
        if tap.parts == 1:
            output = port(output, a_BSD)
            continue
        groups = heads if tap.by_head else 1
        split = output.unflatten(-1, (groups, tap.parts, -1))
        mixed = port(split[..., tap.index, :].flatten(-2), a_BSD)
        output = torch.select_scatter(split, mixed.unflatten(-1, (groups, -1)), -2, tap.index).flatten(-3)
    return output


@contextmanager
def tapped(ports: dict[int, list[tuple[Tap, int, Port]]]):
    """Let the taps of these projections act, for the duration of one layer call."""
    token = _PORTS.set(ports)
    try:
        yield
    finally:
        _PORTS.reset(token)


class Backbone:
    """The view of a causal LM that the executor runs. Holds no state of its own.

    Raises:
        ValueError: a family that is not supported, or an attention implementation that it cannot run with.
    """

    def __init__(self, lm: PreTrainedModel):
        self.lm, self.config = lm, lm.config
        self.family = family_of(lm.config.model_type)
        self.attention()
        base = getattr(lm, self.family.base)
        self.base, self.layers = base, getattr(base, self.family.layers)
        self.shape = shape_of(lm.config)
        self.logit_cap: float | None = getattr(lm.config, "final_logit_softcapping", None)
        self.cache_keyword = cache_keyword(self.layers[0], self.family.cache)
        self.blank: int | None = None  # a token whose embedding is zero: something else is mixed in at its place

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head, also if it was replaced after wrapping."""
        return getattr(self.base, self.family.norm)

    def tap(self, port: str) -> Tap | None:
        """Where inside a layer a port is; None: around it, on what it is called with or returns."""
        return {"input": self.family.input, "key": self.family.key, "value": self.family.value}.get(port)

    def ports(self, layer: int, mixed: Mapping[str, Port]) -> dict[int, list[tuple[Tap, int, Port]]]:
        """What `tapped` needs for a call of this layer. Hooks each projection once; weight names stay as they are."""
        found: dict[int, list] = {}
        for name, port in mixed.items():
            tap = self.tap(name)
            assert tap is not None, "only ports inside a layer are tapped"
            projection = self.layers[layer].get_submodule(tap.module)
            if _tap_hook not in projection._forward_hooks.values():
                projection.register_forward_hook(_tap_hook)
            found.setdefault(id(projection), []).append((tap, self.shape.heads, port))
        return found

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids_BT: Tensor) -> Tensor:
        """Token ids (or ready embeddings) -> `x_BTD`, what layer 0 reads."""
        x_BTD = getattr(self.base, self.family.embed)(input_ids) if inputs_embeds is None else inputs_embeds
        if self.blank is not None and input_ids is not None:
            x_BTD = x_BTD.masked_fill((input_ids == self.blank)[..., None], 0)
        if self.family.positions:
            x_BTD = x_BTD + getattr(self.base, self.family.positions)(position_ids_BT)
        if self.family.dropout:
            x_BTD = getattr(self.base, self.family.dropout)(x_BTD)
        return self.final_norm(x_BTD) if self.family.norm_embedding else x_BTD

    def context(self, input_ids: Tensor | None, x_BTD: Tensor, position_ids_BT: Tensor, past: int) -> Context:
        """What every layer gets beside the states, by keyword, each `_BT...` (B may be 1): rotary cosines and sines.

        A base model of ours says itself: `context(input_ids, x_BTD, position_ids_BT, rows_1T)`, rows counting from the
        first cached position of a row.
        """
        if self.family.ours:
            rows_1T = torch.arange(past, past + x_BTD.shape[1], device=x_BTD.device)[None]
            return self.base.context(input_ids, x_BTD, position_ids_BT, rows_1T)
        if self.family.rotary is None:
            return {}
        rotary = getattr(self.base, self.family.rotary)(x_BTD, position_ids=position_ids_BT)
        return {"position_embeddings": rotary}

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer (None: full attention)."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        return window if kinds is None or kinds[layer] == "sliding_attention" else None

    def attention(self) -> Kind:
        """What masks the layers' attention takes; it may be set anew at any time (`set_attn_implementation`)."""
        return kind_of(self.config._attn_implementation, self.family.ours)

    def mask(self, masks: Masks, layer: int, positions: range, x: Tensor) -> Tensor | None:
        """What a layer that reads `x` at some positions is given as its mask.

        Boolean where autocast chooses the scores' type by itself, or where an encoding of ours that changes scores
        reads the mask first; else a number added to the scores, which saves fused attention a conversion.

        Raises:
            ValueError: `flex_attention` with gradient on CPU, which torch does not have.
        """
        window, kind = self.window(layer), self.attention()
        if kind == "added":
            name = self.config._attn_implementation
            if name == "flex_attention" and x.requires_grad and x.device.type == "cpu":
                raise ValueError("attn_implementation='flex_attention' has no gradient on CPU: train with 'sdpa'")
            mask = masks.added(positions, window, x.dtype, causal=True)
            return mask if mask is None else mask.expand(len(x), -1, -1, -1)  # flex indexes the batch
        changed = getattr(self.config, "position", None) in ("alibi", "cope", "fire")
        if changed or torch.is_autocast_enabled(x.device.type):
            mask = masks(positions, window)
        else:
            mask = masks.added(positions, window, x.dtype)
        if kind == "unmasked" and mask is not None:
            warn_of(self.config._attn_implementation)
        return mask

    def layer(
        self, index: int, x_BSD: Tensor, view, mask: Tensor | None, context: Context, positions: range, repeat: int
    ) -> Tensor:
        """One layer, called as Hugging Face calls it. `repeat`: which repetition of the layer this is, from 0."""
        keywords: dict[str, object] = {self.cache_keyword: view, "attention_mask": mask}
        for name, x in context.items():
            keywords[name] = tuple(take(y, positions) for y in x) if isinstance(x, tuple) else take(x, positions)
        if self.family.ours:
            keywords["repeat"] = repeat
        return self.layers[index](x_BSD, **keywords)

    def head(self, h_BSD: Tensor) -> Tensor:
        """Normed states -> logits `_BSV`."""
        logits, cap = self.lm.get_output_embeddings()(h_BSD), self.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
