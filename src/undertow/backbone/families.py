"""The families of decoder-only models we run on: where their parts are, and nothing else.

A new family is one entry here; `tests/backbone/test_contract.py` tells its author what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tap:
    """Where keys or values sit in a projection's output.

    Args:
        module: path of the projection below the layer.
        parts: how many things the projection makes (3 for fused q, k, v); `index`: which of them this is.
        by_head: the parts alternate head by head (GPT-NeoX) instead of lying one after the other.
    """

    module: str
    parts: int = 1
    index: int = 0
    by_head: bool = False


@dataclass(frozen=True)
class Family:
    """Attribute paths of a causal LM class. `base` is the decoder below it; the other names are below `base`."""

    model_types: tuple[str, ...]
    base: str = "model"
    embed: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    positions: str | None = None  # learned position table added to the embedding (or a module that adds nothing)
    dropout: str | None = None  # applied to the embedding
    norm_embedding: bool = False  # the final (parameter-free) norm is also applied to the embedding
    cache: str = "past_key_values"  # the keyword under which a layer takes its cache
    ours: bool = False  # the base model has a `context` method, and its layers know which repetition they run
    input: Tap | None = None  # whose output the input port mixes into (None: what the layer is called with)
    key: Tap = Tap("self_attn.k_proj")
    value: Tap = Tap("self_attn.v_proj")


FAMILIES = (
    Family(("llama", "mistral", "qwen2", "qwen3", "olmo2")),
    Family(("undertow_llama",), rotary=None, positions="embed_positions", ours=True),
    Family(("nanochat",), norm_embedding=True),
    Family(("undertow_nanochat",), rotary=None, norm_embedding=True, ours=True, input=Tap("scale")),
    Family(
        ("gpt2",),
        base="transformer",
        embed="wte",
        layers="h",
        norm="ln_f",
        rotary=None,
        positions="wpe",
        dropout="drop",
        key=Tap("attn.c_attn", parts=3, index=1),
        value=Tap("attn.c_attn", parts=3, index=2),
    ),
    Family(
        ("gpt_neox",),
        base="gpt_neox",
        embed="embed_in",
        norm="final_layer_norm",
        dropout="emb_dropout",
        cache="layer_past",
        key=Tap("attention.query_key_value", parts=3, index=1, by_head=True),
        value=Tap("attention.query_key_value", parts=3, index=2, by_head=True),
    ),
)


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`. Raises ValueError listing what is supported."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = sorted(t for family in FAMILIES for t in family.model_types)
    raise ValueError(f"backbone model_type {model_type!r} is not supported; supported are {supported}")
