"""A Llama of our own for models from scratch: six position encodings and what Intra-Layer Recurrence adds to a layer.

Hugging Face's modules wherever they fit; attention is ours (their `sdpa` knows no trained bias). The published options
(arXiv 2505.01855 and its code) are fields of the config. Weights have Llama's names, so `position="rope"` with nothing
else is Llama.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import initialization as init
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from undertow.backbone.positions import POSITIONS, Cope, Fire, alibi, attend
from undertow.versions import CACHE, one_cache

__all__ = ["UndertowLlamaConfig", "UndertowLlamaForCausalLM"]


class UndertowLlamaConfig(LlamaConfig):
    """Llama's config, with the published models' defaults where these differ (tied head), and their options.

    Args:
        position: one of nope, rope, learned, alibi, cope, fire. `max_position_embeddings` is the size of the tables of
            learned and cope; only learned cannot go beyond it.
        fire_scale, fire_threshold: FIRE's c and L0 at the start.
        head_scale: queries times a trained number per head, 1.6 at the start and never below 1.
        adaptive_norm: layers (from 0) whose norms take scale and shift from their input (published: those that repeat).
        loop_encoding: repetitions of every layer; those with more than one learn a vector for the norm's input and a
            factor of the MLP for each of them.

    Raises:
        ValueError: an unknown position, a layer that does not exist, or not one count a layer.
    """

    model_type = "undertow_llama"
    conditional: ClassVar = dict.fromkeys(("fire_scale", "fire_threshold"), lambda config: config.position == "fire")

    tie_word_embeddings: bool = True
    position: str = "rope"
    fire_scale: float = 0.1
    fire_threshold: float = 512.0
    head_scale: bool = False
    adaptive_norm: list[int] | None = None
    loop_encoding: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        layers, counts = self.num_hidden_layers, self.loop_encoding
        if self.position not in POSITIONS:
            raise ValueError(f"position={self.position!r}: allowed are {', '.join(POSITIONS)}")
        if self.attention_dropout and self.position in ("cope", "fire"):
            raise ValueError(f"attention_dropout={self.attention_dropout}: must be 0 with position={self.position!r}")
        wrong = [layer for layer in self.adaptive_norm or () if not 0 <= layer < layers]
        if wrong:
            raise ValueError(f"adaptive_norm has layer {wrong[0]}: the model has layers 0..{layers - 1}")
        if counts is not None and (len(counts) != layers or min(counts) < 1):
            raise ValueError(f"loop_encoding={counts}: must be {layers} counts of at least 1, one a layer")


class AdaptiveNorm(nn.Module):
    """`gamma(x) (x - mean) / (std + 1e-6) + beta(x)` with linear maps gamma and beta (std with n - 1, as published)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.gamma, self.beta, self.eps = nn.Linear(width, width), nn.Linear(width, width), eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.gamma(x) * centred / (x.std(-1, keepdim=True) + self.eps) + self.beta(x)


class Attention(nn.Module):
    """Llama's projections, and the attention that the position encoding asks for.

    It calls the attention itself: what Hugging Face registers by name would make ours another implementation than
    `sdpa`, whose masks we need.
    """

    is_causal = True

    def __init__(self, config: UndertowLlamaConfig, layer_idx: int):
        super().__init__()
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        assert kv_heads is not None and config.head_dim is not None, "the config fills them in"
        self.kind, self.layer_idx, self.head_dim = config.position, layer_idx, config.head_dim
        self.num_key_value_groups, self.dropout = heads // kv_heads, float(config.attention_dropout or 0)
        self.q_proj = nn.Linear(width, heads * config.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, kv_heads * config.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, kv_heads * config.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * config.head_dim, width, bias=config.attention_bias)
        if config.position == "cope":
            self.position: nn.Module = Cope(config.head_dim, config.max_position_embeddings)
        elif config.position == "fire":
            self.position = Fire(heads, config.fire_scale, config.fire_threshold)
        self.head_scale = nn.Parameter(torch.empty(heads)) if config.head_scale else None

    def forward(self, a_BSD: Tensor, mask: Tensor | None, cache, encoding: tuple[Tensor, ...]) -> Tensor:
        """`encoding`: what the model's `context` made, at these positions."""
        heads = (*a_BSD.shape[:-1], -1, self.head_dim)
        q, k, v = (project(a_BSD).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        scale, groups = self.head_dim**-0.5, self.num_key_value_groups
        if self.kind == "rope":
            q, k = apply_rotary_pos_emb(q, k, *encoding)
        if self.head_scale is not None:
            # The value is never below 1; the gradient passes, so that a number at the bound can leave it.
            above = self.head_scale + (self.head_scale.clamp(min=1) - self.head_scale).detach()
            q, scale = q * (scale * above)[:, None, None].to(q.dtype), 1.0  # before CoPE reads the query, as published
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if self.kind in ("cope", "fire"):
            bias = encoding[self.layer_idx].transpose(1, 2)[..., : k.shape[2]] if self.kind == "fire" else None
            table = self.position.table_EP if isinstance(self.position, Cope) else None
            o_BHSE = attend(q, repeat_kv(k, groups), repeat_kv(v, groups), mask, scale, bias, table)
            return self.o_proj(o_BHSE.transpose(1, 2).flatten(2))
        if self.kind == "alibi":
            bias = encoding[0].transpose(1, 2)[..., : k.shape[2]].to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, torch.finfo(q.dtype).min)
        dropout = self.dropout if self.training else 0.0
        o_BSHE, _ = sdpa_attention_forward(self, q, k, v, mask, dropout=dropout, scaling=scale)
        return self.o_proj(o_BSHE.flatten(2))


class LoopEncoding(nn.Module):
    """What tells the repetitions of a layer apart: a vector for the norm's input and a factor of the MLP for each."""

    def __init__(self, repeats: int, width: int):
        super().__init__()
        self.input, self.weight = nn.Embedding(repeats, width), nn.Embedding(repeats, 1)


class Layer(GradientCheckpointingLayer):
    """Llama's layer; `repeat` says which repetition this is, for layers with a loop encoding."""

    def __init__(self, config: UndertowLlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        adaptive = layer_idx in (config.adaptive_norm or ())
        norm = AdaptiveNorm if adaptive else partial(LlamaRMSNorm, eps=config.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm = norm(config.hidden_size), norm(config.hidden_size)
        repeats = config.loop_encoding[layer_idx] if config.loop_encoding else 1
        self.loop = LoopEncoding(repeats, config.hidden_size) if repeats > 1 else None

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask=None,
        past_key_values=None,
        position_embeddings=(),
        repeat: int = 0,
        cache=None,
    ) -> Tensor:
        """One visit. Raises ValueError for a repetition that the loop encoding does not have."""
        loop, read_BSD = self.loop, x_BSD
        if loop is not None:
            if repeat >= loop.input.num_embeddings:
                raise ValueError(
                    f"layer {self.self_attn.layer_idx}: its loop encoding has {loop.input.num_embeddings} "
                    f"repetitions, and this is number {repeat + 1}"
                )
            read_BSD = x_BSD + loop.input.weight[repeat]  # the residual stream itself stays clean
        a_BSD = self.input_layernorm(read_BSD)
        x_BSD = x_BSD + self.self_attn(a_BSD, attention_mask, one_cache(past_key_values, cache), position_embeddings)
        m_BSD = self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD + (m_BSD if loop is None else loop.weight.weight[repeat] * m_BSD)


class UndertowLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What both classes below share: the config, and the start of the parameters that Llama does not have."""

    config_class = UndertowLlamaConfig
    _no_split_modules = ["Layer"]
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False
    _can_record_outputs = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Cope):
            init.zeros_(module.table_EP)
        elif isinstance(module, Fire):
            for name, value in module.start.items():
                init.constant_(getattr(module, name), value)
            for weight, bias in ((module.in_weight, module.in_bias), (module.out_weight, module.out_bias)):
                init.normal_(weight, std=self.config.initializer_range)
                init.zeros_(bias)
        elif isinstance(module, Attention) and module.head_scale is not None:
            init.constant_(module.head_scale, 1.6)


class NoTable(nn.Module):
    """In place of a learned position table: adds nothing to the embedding, at any position."""

    def forward(self, position_ids_BT: Tensor) -> Tensor:
        return position_ids_BT.new_zeros(())


class UndertowLlamaModel(UndertowLlamaPreTrainedModel):
    """embed -> layers -> norm, with a `context` for whoever calls the layers one by one."""

    def __init__(self, config: UndertowLlamaConfig):
        super().__init__(config)
        size, width, learned = config.max_position_embeddings, config.hidden_size, config.position == "learned"
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.embed_positions = nn.Embedding(size, width) if learned else NoTable()
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config) if config.position == "rope" else None
        self.gradient_checkpointing = False
        self.post_init()

    def context(
        self, input_ids: Tensor | None, x_BTD: Tensor, position_ids_BT: Tensor, rows_1T: Tensor
    ) -> dict[str, tuple[Tensor, ...]]:
        """What every layer gets, by keyword, each with T in dimension 1; made once, whatever is repeated.

        rope: cosines and sines `_BTE`. alibi: one bias `_1THK` over all keys up to the newest row. fire: one bias
        `_BTHK` a layer (B is 1 where all rows have the same positions). Nothing for the others.
        """
        if self.rotary_emb is not None:
            return {"position_embeddings": self.rotary_emb(x_BTD, position_ids=position_ids_BT)}
        if self.config.position == "alibi":
            return {"position_embeddings": (alibi(rows_1T, self.config.num_attention_heads, x_BTD.dtype),)}
        if self.config.position == "fire":
            same = bool((position_ids_BT == position_ids_BT[:1]).all())
            positions = position_ids_BT[:1] if same else position_ids_BT
            layers = [layer.get_submodule("self_attn.position") for layer in self.layers]
            return {"position_embeddings": tuple(fire(positions, rows_1T) for fire in layers)}
        return {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As Llama's. Raises ValueError for another attention than sdpa, or more positions than a learned table has."""
        if self.config._attn_implementation != "sdpa":
            raise ValueError(f"attn_implementation={self.config._attn_implementation!r}: only 'sdpa' is supported")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        table, T, past_key_values = self.embed_positions, x_BTD.shape[1], one_cache(past_key_values, cache)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows_1T = torch.arange(past, past + T, device=x_BTD.device)[None]
        position_ids = rows_1T if position_ids is None else position_ids
        if isinstance(table, nn.Embedding) and past + T > table.num_embeddings:
            raise ValueError(f"{past + T} positions: the learned position table has {table.num_embeddings}")
        x_BTD = x_BTD + table(position_ids)
        mask = create_causal_mask(self.config, x_BTD, attention_mask, past_key_values, position_ids)
        context = self.context(input_ids, x_BTD, position_ids, rows_1T)
        for layer in self.layers:
            x_BTD = layer(x_BTD, attention_mask=mask, **{CACHE: past_key_values}, **context)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), **{CACHE: past_key_values})


class UndertowLlamaForCausalLM(UndertowLlamaPreTrainedModel, LlamaForCausalLM):
    """The language model: Llama's, on the layers above."""

    def __init__(self, config: UndertowLlamaConfig):
        UndertowLlamaPreTrainedModel.__init__(self, config)
        self.model = UndertowLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("undertow_llama", UndertowLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(UndertowLlamaConfig, UndertowLlamaForCausalLM, exist_ok=True)
