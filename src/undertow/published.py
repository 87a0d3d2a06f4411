"""What published checkpoints call things: their tensors' names, as tables, and their settings' meaning in our words.

A table is `regular expression of a whole name -> our name`, None for a tensor that nothing needs; `undertow.convert`
reads it, and a caller may add to it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Names = Mapping[str, str | None]
_WRAPPED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain(name: str) -> str:
    """A tensor's name without what compiling, sharding and checkpointing put into it, wherever they do."""
    return _WRAPPED.sub("", name)


# --- T2MLR (arXiv 2607.15178)

# Its mixer sits inside the block it wraps. `recurrent` is the memory's side, `input` the residual stream's.
T2MLR_NAMES: Names = {
    r".*mixing_module\.recurrent_projection\.weight": "undertow.memory_projection.weight",
    r".*mixing_module\.recurrent_gate_proj\.(weight|bias)": r"undertow.memory_mixer.gate_m.\1",
    r".*mixing_module\.input_gate_proj\.(weight|bias)": r"undertow.memory_mixer.gate_x.\1",
    r".*mixing_module\.rezero_gamma_recurrent_gate": "undertow.memory_mixer.scale_m",
    r".*mixing_module\.rezero_gamma_input_gate": "undertow.memory_mixer.scale_x",
    r".*\.rotary_emb\.inv_freq": None,
}

# Setting -> what it is where config.json leaves it out, and the values we can compute. A setting that only training
# reads (depths, detaching, initialisation, dropout, checkpointing) is not here: it changes nothing in a saved model.
T2MLR_SETTINGS: Mapping[str, tuple[Any, tuple]] = {
    "t2mlr_enabled": (True, (True,)),
    "recurrent_mixing_module_name": ("none", ("gated",)),
    "recurrent_skip_to_l_end": (False, (False,)),
    "pre_norm_streams": (False, (False,)),
    "post_norm": (False, (False,)),
    "recurrent_state_proj_type": ("auto", ("auto", "linear")),
    "use_learnable_recurrent_gate": (False, (True,)),
    "use_learnable_input_gate": (False, (True,)),
    "normalize_gates": (False, (False,)),
    "gate_proj_type": ("linear", ("linear",)),
    "use_rezero_residual": (True, (True,)),
    "rezero_gamma_scalar": (True, (True,)),
    "disable_x_branch": (False, (False,)),
}
CARRY = "recurrent_residual_to_recurrent_cache"
CARRY_SETTINGS = {f"{CARRY}_post_norm_eps": (1e-6, (1e-6,)), f"{CARRY}_post_norm_clamp": (5.0, (5.0,))}
# Buffers of ours that it has no tensor for, since it has no such thing: they stay as they are built.
OURS_ALONE = ("undertow.memory_mixer.strength",)
# Settings that their own code never reads.
DEAD = re.compile(r"recurrent_weight|orig_weight|eval_batch_forward|(use_)?recurrent_weight_curriculum\w*")

# --- LRT (arXiv 2605.26797)

# After `unstacked`: `resid_lambdas.3` is layer 3's entry, `.memory` and `.token` are parts of a gate.
LRT_NAMES: Names = {
    r"transformer\.wte\.weight": "backbone.model.embed_tokens.weight",
    r"lm_head\.weight": "backbone.lm_head.weight",
    r"transformer\.h\.(\d+)\.attn\.c_([qkv])\.weight": r"backbone.model.layers.\1.self_attn.\2_proj.weight",
    r"transformer\.h\.(\d+)\.attn\.c_proj\.weight": r"backbone.model.layers.\1.self_attn.o_proj.weight",
    r"transformer\.h\.(\d+)\.attn\.gate\.token": r"backbone.model.layers.\1.self_attn.value_gate.weight",
    r"transformer\.h\.(\d+)\.attn\.gate\.memory": r"undertow.gate_\1.gate.weight",
    r"transformer\.h\.(\d+)\.mlp\.c_fc\.weight": r"backbone.model.layers.\1.mlp.up_proj.weight",
    r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight": r"backbone.model.layers.\1.mlp.down_proj.weight",
    r"resid_lambdas\.(\d+)": r"backbone.model.layers.\1.scale.alpha",
    r"x0_lambdas\.(\d+)": r"backbone.model.layers.\1.scale.beta",
    r"interleaved_lambdas\.(\d+)": r"undertow.residual_\1.scale",
    r"(?:interleaved_init_)?value_embeds\.(\d+)\.weight": r"backbone.model.value_tables.\1.weight",
    r"interleaved_key_projections\.(\d+)\.W_v\.weight": r"undertow.memory_key_\1.weight",
    r"interleaved_projections\.(\d+)\.W_v\.weight": r"undertow.memory_value_\1.weight",
}
# Field of the backbone's config -> their name of it.
LRT_CONFIG: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "sequence_len",
    "window_pattern": "window_pattern",
}
STACKED = re.compile(r"(?:resid|x0|interleaved)_lambdas")  # one entry a layer
TABLE = re.compile(r"transformer\.wte\.weight|lm_head\.weight|.*value_embeds\.\d+\.weight")  # V padded to 64s
TURNED = re.compile(r"transformer\.h\.\d+\.attn\.c_[qk]\.weight|interleaved_key_projections\.\d+\.W_v\.weight")
GATE = re.compile(r"(transformer\.h\.\d+\.attn)\.(?:triple_gate|ve_gate)\.weight")


def unstacked(theirs: Mapping[str, Tensor], vocab: int, kv_heads: int, head_width: int) -> dict[str, Tensor]:
    """LRT's tensors, one for each of ours.

    Per-layer scalars are taken apart and padded tables cropped. A gate has 3G rows (local, memory, token), or G without
    a memory (token alone); it is split. Its rotary embedding turns by -t theta, ours by +t theta: the same scores when
    the second half of every head of q and k changes sign, which is done to the rows that make them.

    Raises:
        ValueError: rows that do not fit the heads.
    """
    found: dict[str, Tensor] = {}
    for name, x in ((plain(name), x) for name, x in theirs.items()):
        gate = GATE.fullmatch(name)
        if gate and len(x) not in (kv_heads, 3 * kv_heads):
            raise ValueError(f"{name} has {len(x)} rows: {kv_heads} key/value heads need {kv_heads} or {3 * kv_heads}")
        if TURNED.fullmatch(name) and len(x) % head_width:
            raise ValueError(f"{name} has {len(x)} rows: no multiple of the head width, {head_width}")
        if STACKED.fullmatch(name):
            found |= {f"{name}.{i}": x[i : i + 1] for i in range(len(x))}
        elif TABLE.fullmatch(name):
            found[name] = x[:vocab]
        elif TURNED.fullmatch(name):
            sign = torch.ones(head_width, 1, dtype=x.dtype)
            sign[head_width // 2 :] = -1
            found[name] = x * sign.repeat(len(x) // head_width, 1)
        elif gate:
            found[f"{gate[1]}.gate.token"] = x[-kv_heads:]
            if len(x) > kv_heads:
                found[f"{gate[1]}.gate.memory"] = x[: 2 * kv_heads]
        else:
            found[name] = x
    return found


@dataclass(frozen=True)
class Published:
    """A published checkpoint, read: the backbone's config, the time method, and the tables of its names.

    `split` takes stacked tensors apart before they are renamed; `training` says how it was trained, in our words;
    `format` how its texts are read, where its tokenizer alone does not say it (fields of `undertow.data.TextFormat`).
    """

    backbone: dict
    time: dict
    names: Names
    training: str
    split: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    format: Mapping[str, Any] = field(default_factory=dict)


def read_t2mlr(config: Mapping) -> Published:
    """The meaning of a T2MLR `config.json`.

    Raises:
        ValueError: a setting whose formula we do not compute (one line, with what is allowed).
    """
    more = config.get("mixing_module_kwargs") or {}
    if not isinstance(more, dict):
        raise ValueError(f"mixing_module_kwargs={more!r}: must be a mapping")
    said = {**config, **more}
    for gate in ("use_learnable_recurrent_gate", "use_learnable_input_gate"):  # None inherits
        if said.get(gate) is None:
            said[gate] = said.get("use_learnable_gate", False)
    carried = said.get(CARRY, False)
    for name, (default, allowed) in {**T2MLR_SETTINGS, **(CARRY_SETTINGS if carried else {})}.items():
        if said.get(name, default) not in allowed:
            only = " or ".join(map(repr, allowed))
            raise ValueError(f"{name}={said.get(name, default)!r}: only {only} can be imported")
    project = "linear" if said.get("use_recurrent_projection", False) else None
    time = {"method": "T2MLR", "start": said.get("l_start", 0), "end": said.get("l_end", -1), "project": project}
    if carried:
        time |= {
            "carry": "residual",
            "carry_weight": said.get(f"{CARRY}_weight", 1.0),
            "carry_norm": said.get(f"{CARRY}_post_norm", False),
            "carry_detach": said.get(f"{CARRY}_detach", False),
        }
    dead = sorted(name for name in said if DEAD.fullmatch(name))
    if dead:
        line = f"settings without a meaning, which the published code never reads: {', '.join(dead)}"
        warnings.warn(line, stacklevel=2)
    base = config.get("base_config")
    if not isinstance(base, dict):
        raise ValueError(f"base_config={base!r}: a T2MLR config.json holds the config of its backbone there")
    width = base.get("hidden_size", base.get("n_embd"))
    if project and said.get("recurrent_projection_dim") not in (None, width):
        dim = said["recurrent_projection_dim"]
        raise ValueError(f"recurrent_projection_dim={dim}: only None and the width, {width}, can be imported")
    base = base | {"model_type": config.get("base_model_type") or base.get("model_type")}
    depth, back = said.get("batch_forward_approximate_depth", 1), said.get("batch_backward_approximate_depth", 10**7)
    live = f", backward={back}" if back < depth else ""
    everywhere = said.get("control_flow_all_recurrent") or said.get("recurrence_in_prompt")
    form = {"memory": "all" if everywhere else "response"}  # its prompts are control flow 1
    return Published(base, time, T2MLR_NAMES, f"Jacobi(K={depth}{live}, start='unmixed')", format=form)


def read_lrt(config: Mapping) -> Published:
    """The meaning of an LRT (nanochat) model config, `model_config` of its `meta_*.json`."""
    for name in LRT_CONFIG.values():
        if name not in config:
            raise ValueError(f"config of an LRT checkpoint: {name} is missing")
    if not (config.get("use_interleaved") or config.get("use_multi_refine")):
        raise ValueError("use_interleaved and use_multi_refine are off: a plain model, without LRT's memory")
    backbone = {"model_type": "undertow_nanochat"} | {ours: config[name] for ours, name in LRT_CONFIG.items()}
    # Its short window is t - s <= T/2; our count includes the position itself.
    backbone |= {"value": "every", "sliding_window": config["sequence_len"] // 2 + 1}
    backbone |= {"rms_norm_eps": 2.0**-23, "rotary_tables": "bfloat16"}  # whatever the precision
    channels = config.get("ve_gate_channels", 0)  # of all three gates; 0 is all of D
    backbone["value_gate_channels"] = channels
    weights = tuple(config.get("multi_refine_loss_weights") or ())
    training = f"Interleaved(S={config.get('interleaved_num_passes', 2)})"
    if config.get("use_multi_refine"):
        training = f"Jacobi(K={config.get('multi_refine_num_passes', 2)}, loss={weights or 'mean'!r})"
    time = {"method": "LRT", "source": -1, "shared": False, "gate_channels": channels or None}
    sizes = {"vocab": config["vocab_size"], "kv_heads": config["n_kv_head"]}
    sizes["head_width"] = config["n_embd"] // config["n_head"]
    form = {"memory": "all", "bos": True}  # every document of nanochat begins with it
    return Published(backbone, time, LRT_NAMES, training, partial(unstacked, **sizes), form)


READERS: Mapping[str, Callable[[Mapping], Published]] = {"t2mlr": read_t2mlr, "lrt": read_lrt}
