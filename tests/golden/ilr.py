"""ILR (arXiv 2505.01855, release e3bfeb0) in our words: names of tensors, the model of a case, and its outputs."""

from __future__ import annotations

import re

import torch
from transformers import AutoConfig

import undertow as ut
from golden.cases import Case, Tensors, fill, widen
from undertow.methods.base import Method

PLACES = {
    "self_attn.scale_param": "self_attn.head_scale",
    "self_attn.cope.pos_emb": "self_attn.position.table_EP",
    "self_attn.fire.mlp.0.weight": "self_attn.position.in_weight",
    "self_attn.fire.mlp.0.bias": "self_attn.position.in_bias",
    "self_attn.fire.mlp.2.weight": "self_attn.position.out_weight",
    "self_attn.fire.mlp.2.bias": "self_attn.position.out_bias",
    "self_attn.fire.L_multiplier": "self_attn.position.a",
    "self_attn.fire.init_L": "self_attn.position.threshold",
    "self_attn.fire.c": "self_attn.position.c",
    "embed_loop_nums.weight": "loop.input.weight",
    "weight_loop_nums.weight": "loop.weight.weight",
    "layernorm.adaptive_gamma": "layernorm.gamma",
    "layernorm.adaptive_beta": "layernorm.beta",
}
DEAD = re.compile(r"model\.adapter\.weight|.*layernorm\.(gamma|beta)")  # their forward never reads these
MAPS = {"1111": (1, 1, 1, 1), "4211": (4, 2, 1, 1), "1223": (1, 2, 2, 3)}


def ours(name: str) -> str:
    for theirs, mine in PLACES.items():
        name = name.replace(theirs, mine)
    return "backbone." + name


def build(case: Case, dtype: torch.dtype, weights: Tensors, counts=None) -> ut.UndertowForCausalLM:
    """`counts`: the map, in a case that has several."""
    depth = dict(case.ours["depth"], **({"counts": counts} if counts else {}))
    config = AutoConfig.for_model(**case.ours["backbone"], bos_token_id=1, eos_token_id=None, pad_token_id=None)
    model = ut.from_scratch(config, depth=Method.from_dict(depth, "depth")).to(dtype)
    state = model.state_dict()
    given = {ours(name): x for name, x in weights.items() if not DEAD.fullmatch(name)}
    given = {name: x for name, x in given.items() if name in state or "inv_freq" not in name}
    fill(model, given)
    return widen(model) if dtype == torch.float64 else model


def expected(case: Case, wanted: Tensors) -> Tensors:
    return wanted


def outputs(case: Case, dtype: torch.dtype, weights: Tensors, inputs: Tensors, wanted: Tensors) -> dict:
    found: dict = {}
    for tag in sorted({"_" + key.split("_")[1] for key in wanted if key.startswith("logits_")}) or [""]:
        model = build(case, dtype, weights, MAPS.get(tag[1:])).train()
        out = model(inputs["input_ids"], labels=inputs["labels"])
        out.loss.backward()
        found |= {f"logits{tag}": out.logits, f"loss{tag}": out.loss}
        own = dict(model.named_parameters())
        found |= {key: own[ours(key.split("/", 1)[1])].grad for key in wanted if key.startswith(f"grad{tag}/")}
        if f"greedy_ids{tag}" in wanted:
            p = inputs["prompt_ids"]
            found[f"greedy_ids{tag}"] = model.eval().generate(
                p,
                attention_mask=torch.ones_like(p),
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
    return found
