"""A nanochat-style backbone of our own, the one that the published LRT stands on (arXiv 2605.26797, section 2).

With N the RMS norm without weights, x0 = N(embedding) and U a table of the layer (`value` says which layers have one):

    u = alpha x + beta x0,   a = N(u)
    q, k, v = W_q a, W_k a, W_v a;   v += 2 sig(W_g a[:c]) U[token], one gate a key/value head
    q, k = N(RoPE(q)), N(RoPE(k)),   x = u + W_o attention,   x += W_2 relu(W_1 N(x))^2
    logits = 15 tanh(W_lm N(x) / 15), in float32 at least

No biases, untied head. Hugging Face's own NanoChat has neither the scales, nor the tables, nor the windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from undertow.versions import CACHE, one_cache

__all__ = ["UndertowNanoChatConfig", "UndertowNanoChatForCausalLM"]

VALUES = ("none", "alternate", "every")
ROTARY = ("exact", "bfloat16")
WINDOWS = {"S": "sliding_attention", "L": "full_attention"}


@strict
class UndertowNanoChatConfig(PreTrainedConfig):
    """Sizes of the backbone. The defaults are those of depth 12; `from_depth` gives those of any other.

    Args:
        intermediate_size: None is 4 `hidden_size`.
        num_key_value_heads, head_dim: None are `num_attention_heads` and `hidden_size / num_attention_heads`.
        max_position_embeddings: T of training; it only decides the default window.
        value: which layers have a value table: none, every second one (the last included) or every one.
        value_gate_channels: c, how many channels of `a` the value gate reads (0: all).
        rotary_tables: cosines and sines `exact` (float32 at least, then in the model's precision) or rounded to
            `bfloat16`, as the release keeps them in every precision.
        window_pattern: `S` and `L` layers, tiled; the last layer is `L` always. `layer_types` follows from it.
        sliding_window: keys that a position of an `S` layer sees, itself included (None: half of T and itself, as
            released).

    Raises:
        ValueError: a value outside what is allowed, or fields that do not fit each other.
    """

    model_type = "undertow_nanochat"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    conditional: ClassVar = {"value_gate_channels": lambda config: config.value != "none"}

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float | int = 10_000.0
    rms_norm_eps: float | int = 2.0**-23  # what torch takes for None in float32
    final_logit_softcapping: float | int = 15.0
    value: str = "alternate"
    value_gate_channels: int = 0
    rotary_tables: str = "exact"
    window_pattern: str = "SSSL"
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for name in sizes:
            self._whole(name)
        D, H, L = self.hidden_size, self.num_attention_heads, self.num_hidden_layers
        if self.intermediate_size is None:
            self.intermediate_size = 4 * D
        if self.num_key_value_heads is None:
            self.num_key_value_heads = H
        if self.head_dim is None:
            self._need("hidden_size", D % H == 0, f"a multiple of num_attention_heads={H}")
            self.head_dim = D // H
        if self.sliding_window is None:
            self.sliding_window = self.max_position_embeddings // 2 + 1
        for name in ("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window"):
            self._whole(name)
        self._whole("value_gate_channels", 0)
        self._need("value_gate_channels", self.value_gate_channels <= D, f"at most hidden_size={D}")
        self._need("num_key_value_heads", H % self.num_key_value_heads == 0, f"a divisor of num_attention_heads={H}")
        self._need("head_dim", self.head_dim % 2 == 0, "even, for the rotary embedding")
        for name in ("rope_theta", "rms_norm_eps", "final_logit_softcapping"):
            number = getattr(self, name)
            self._need(name, isinstance(number, int | float) and number > 0, "a number greater than 0")
        self._need("value", self.value in VALUES, f"one of {VALUES}")
        self._need("rotary_tables", self.rotary_tables in ROTARY, f"one of {ROTARY}")
        pattern = self.window_pattern
        self._need("window_pattern", isinstance(pattern, str) and set() < set(pattern) <= set(WINDOWS), "letters S, L")
        kinds = [WINDOWS[pattern[i % len(pattern)]] for i in range(L - 1)] + [WINDOWS["L"]]
        self._need("layer_types", self.layer_types in (None, kinds), f"left out, or what window_pattern says: {kinds}")
        self.layer_types = kinds
        self._need("tie_word_embeddings", self.tie_word_embeddings is False, "False: embedding and head start apart")
        super().__post_init__(**kwargs)

    def _need(self, name: str, fits: bool, what: str):
        if not fits:
            raise ValueError(f"{type(self).__name__} {name}={getattr(self, name)!r}: must be {what}")

    def _whole(self, name: str, least: int = 1):
        value = getattr(self, name)
        self._need(name, type(value) is int and value >= least, f"a whole number of at least {least}")

    def has_table(self, layer: int) -> bool:
        """Whether a layer has a value table."""
        alternate = self.value == "alternate" and (self.num_hidden_layers - 1 - layer) % 2 == 0
        return self.value == "every" or alternate

    @classmethod
    def from_depth(cls, layers: int, **fields: Any) -> UndertowNanoChatConfig:
        """nanochat's one dial: width 64 L, rounded up to heads of 128. `fields` override the rest (T = 2048)."""
        heads = max(1, ceil(64 * layers / 128))
        sizes = {"num_hidden_layers": layers, "hidden_size": 128 * heads, "num_attention_heads": heads}
        return cls(**(sizes | fields))


class Reading(nn.Linear):
    """A map of normed states; starts uniform with std 1/sqrt(D)."""


class Silent(nn.Linear):
    """A map that starts at zero: a layer's output, or what a gate reads."""


class Table(nn.Embedding):
    """A value vector for every token; starts as `Reading`."""


class Head(nn.Linear):
    """A projection whose result is float32 at least: the soft cap would be coarse in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Norm(nn.Module):
    """N: scale to RMS 1, no weights."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Scale(nn.Module):
    """`alpha x + beta x0`: what a layer starts from, and where edges to its input mix in."""

    def __init__(self):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x_BSD: Tensor, x0_BSD: Tensor) -> Tensor:
        return self.alpha * x_BSD + self.beta * x0_BSD


def rotate(x_BHSE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Rotary position embedding, the two halves of a head as real and imaginary parts."""
    real, imaginary = x_BHSE.chunk(2, -1)
    turned = torch.cat((-imaginary, real), -1)
    return x_BHSE * cos_BSE[:, None] + turned * sin_BSE[:, None]


class Attention(nn.Module):
    """Attention with QK-norm after RoPE; a token's own value vector, gated per head, joins its values."""

    def __init__(self, config: UndertowNanoChatConfig, layer: int):
        super().__init__()
        D, H, G, E = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert G is not None and E is not None, "the config filled them in"
        self.layer_idx, self.head_dim, self.grouped = layer, E, G != H
        self.q_proj = Reading(D, H * E, bias=False)
        if config.has_table(layer):
            self.value_gate = Silent(config.value_gate_channels or D, G, bias=False)
        self.k_proj = Reading(D, G * E, bias=False)
        self.v_proj = Reading(D, G * E, bias=False)
        self.o_proj = Silent(H * E, D, bias=False)
        self.norm = Norm(config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        a_BSD: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor],
        value_BSK: Tensor | None,
    ) -> Tensor:
        q, k, v = (self._heads(project(a_BSD)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if value_BSK is not None:
            gate_BSG = 2 * torch.sigmoid(self.value_gate(a_BSD[..., : self.value_gate.in_features]))
            v = v + (gate_BSG.transpose(1, 2)[..., None] * self._heads(value_BSK)).to(v.dtype)
        # Rotated in the embedding's precision, stored in the projections': under autocast the cache stays small.
        q, k = (self.norm(rotate(x, *position_embeddings)).to(v.dtype) for x in (q, k))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        causal = attention_mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """`W_2 relu(W_1 x)^2`."""

    def __init__(self, config: UndertowNanoChatConfig):
        super().__init__()
        assert config.intermediate_size is not None, "the config filled it in"
        self.up_proj = Reading(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Silent(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_BSD)).square())


class Layer(nn.Module):
    """One layer; the equations are at the top of this file."""

    def __init__(self, config: UndertowNanoChatConfig, layer: int):
        super().__init__()
        self.value = f"value_{layer}"
        self.norm, self.scale = Norm(config.rms_norm_eps), Scale()
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(
        self,
        x_BSD: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        x0: Tensor,
        repeat: int = 0,
        **values: Tensor,
    ) -> Tensor:
        """Run the layer.

        Args:
            x_BSD: the stream; the rest by keyword, as the base model's `context` made it.
            past_key_values: whatever has `update(k_BGSE, v_BGSE, layer_idx)`; None attends to these positions only.
            attention_mask: bool `_B1SK`; None is causal, or one newest position that sees everything.
            repeat: which repetition of the layer this is; all of them are alike.
            values: the looked-up value vectors of all layers, by `value_{layer}`.
        """
        u = self.scale(x_BSD, x0)
        u = u + self.self_attn(
            self.norm(u), attention_mask, past_key_values, position_embeddings, values.get(self.value)
        )
        return u + self.mlp(self.norm(u))


class _PreTrained(PreTrainedModel):
    config_class = UndertowNanoChatConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module):
        """The published start: layers write nothing, gates are 1, everything that reads has std 1/sqrt(D)."""
        bound = sqrt(3 / self.config.hidden_size)
        if isinstance(module, Reading | Table):
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, Silent):
            init.zeros_(module.weight)
        elif isinstance(module, Head | nn.Embedding):
            init.normal_(module.weight, std=0.001 if isinstance(module, Head) else 1.0)
        elif isinstance(module, Scale):
            init.ones_(module.alpha)
            init.constant_(module.beta, 0.1)


class UndertowNanoChatModel(_PreTrained):
    """Embedding, norm, layers, norm."""

    def __init__(self, config: UndertowNanoChatConfig):
        super().__init__(config)
        assert config.num_key_value_heads is not None and config.head_dim is not None, "the config filled them in"
        L, V, K = config.num_hidden_layers, config.vocab_size, config.num_key_value_heads * config.head_dim
        self.embed_tokens = nn.Embedding(V, config.hidden_size)
        self.value_tables = nn.ModuleDict({str(i): Table(V, K) for i in range(L) if config.has_table(i)})
        self.layers = nn.ModuleList(Layer(config, i) for i in range(L))
        self.norm = Norm(config.rms_norm_eps)
        self.post_init()

    def context(
        self, input_ids: Tensor | None, x_BTD: Tensor, position_ids_BT: Tensor, rows_1T: Tensor
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """What every layer gets beside the stream, once a forward: rotary tables, x0, and the tokens' value vectors.

        The tables are looked up here, not in the layers, so that their gradient is made once however many sweeps run.

        Raises:
            ValueError: no token ids although there are value tables.
        """
        if input_ids is None and len(self.value_tables):
            raise ValueError(
                f"inputs_embeds without input_ids: value={self.config.value!r} looks tokens up in every layer's table; "
                "only value='none' runs on embeddings alone"
            )
        exact = torch.promote_types(x_BTD.dtype, torch.float32)
        powers_E = torch.arange(0, self.config.head_dim, 2, device=x_BTD.device, dtype=exact) / self.config.head_dim
        angles_BTE = position_ids_BT[..., None].to(exact) * self.config.rope_theta**-powers_E
        angles_BTE = torch.cat((angles_BTE, angles_BTE), -1)
        held = torch.bfloat16 if self.config.rotary_tables == "bfloat16" else x_BTD.dtype
        tables = tuple(table.to(held).to(x_BTD.dtype) for table in (angles_BTE.cos(), angles_BTE.sin()))
        values = {f"value_{i}": table(input_ids) for i, table in self.value_tables.items()}
        return {"position_embeddings": tables, "x0": x_BTD, **values}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hugging Face's own forward. Raises ValueError unless exactly one of ids and embeddings is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = one_cache(past_key_values, cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows_1T = torch.arange(past, past + x.shape[1], device=x.device)[None]
        position_ids = rows_1T if position_ids is None else position_ids
        made: dict[str, Any] = {}
        for kind, make in ((WINDOWS["L"], create_causal_mask), (WINDOWS["S"], create_sliding_window_causal_mask)):
            if kind in self.config.layer_types:
                made[kind] = make(self.config, x, attention_mask, past_key_values, position_ids)
        x = self.norm(x)
        context: Mapping[str, Any] = self.context(input_ids, x, position_ids, rows_1T)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, past_key_values, made[kind], **context)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: past_key_values})  # type: ignore[arg-type]


class UndertowNanoChatForCausalLM(_PreTrained, GenerationMixin):
    """The backbone as a plain Hugging Face causal LM, without any recurrence."""

    def __init__(self, config: UndertowNanoChatConfig):
        super().__init__(config)
        self.model = UndertowNanoChatModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As every Hugging Face causal LM; `labels` are shifted inside."""
        past_key_values = one_cache(past_key_values, cache)
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(self.lm_head(out.last_hidden_state[:, keep]) / cap)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(out, CACHE)})


AutoConfig.register("undertow_nanochat", UndertowNanoChatConfig, exist_ok=True)
AutoModelForCausalLM.register(UndertowNanoChatConfig, UndertowNanoChatForCausalLM, exist_ok=True)
