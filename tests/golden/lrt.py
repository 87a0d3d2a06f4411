"""LRT (arXiv 2605.26797, release e0d0f6e) in our words: names of tensors, the model of a case, and its outputs."""

from __future__ import annotations

import re

import torch
from transformers import AutoConfig

import undertow as ut
from golden.cases import Case, Tensors, fill
from undertow.methods.base import Method

LAYER = "backbone.model.layers.{}."
INSIDE = {  # transformer.h.N
    "attn.c_v.weight": "self_attn.v_proj.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.c_fc.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
SCALARS = {  # one entry a layer
    "resid_lambdas": LAYER + "scale.alpha",
    "x0_lambdas": LAYER + "scale.beta",
    "interleaved_lambdas": "undertow.residual_{}.scale",
}


def turned(x: torch.Tensor, head_width: int) -> torch.Tensor:
    """Their rotary embedding turns the other way: the second half of every head's rows changes sign."""
    sign = torch.ones(head_width, dtype=x.dtype)
    sign[head_width // 2 :] = -1
    return x * sign.repeat(len(x) // head_width)[:, None]


def ours(case: Case, tensors: Tensors) -> Tensors:
    """Their tensors, or gradients, under our names in our layout; some of theirs hold several of ours."""
    said = case.settings
    V, G, E = said["vocab_size"], said["n_kv_head"], said["n_embd"] // said["n_head"]
    found: Tensors = {}
    for name, x in tensors.items():
        if name in ("transformer.wte.weight", "lm_head.weight"):  # padded to a multiple of 64
            found["backbone." + ("lm_head" if name[0] == "l" else "model.embed_tokens") + ".weight"] = x[:V]
        elif name in SCALARS:
            found |= {SCALARS[name].format(i): x[i : i + 1] for i in range(len(x))}
        elif m := re.fullmatch(r"(?:interleaved_init_)?value_embeds\.(\d+)\.weight", name):
            found[f"backbone.model.value_tables.{m[1]}.weight"] = x[:V]
        elif m := re.fullmatch(r"interleaved_(key_)?projections\.(\d+)\.W_v\.weight", name):
            found[f"undertow.memory_{'key' if m[1] else 'value'}_{m[2]}.weight"] = turned(x, E) if m[1] else x
        else:
            m = re.fullmatch(r"transformer\.h\.(\d+)\.(.*)", name)
            layer, rest = LAYER.format(m[1]), m[2]
            if rest in ("attn.c_q.weight", "attn.c_k.weight"):
                found[layer + f"self_attn.{rest[7]}_proj.weight"] = turned(x, E)
            elif rest == "attn.ve_gate.weight":
                found[layer + "self_attn.value_gate.weight"] = x
            elif rest == "attn.triple_gate.weight":  # rows: local, memory, token's own value
                found[f"undertow.gate_{m[1]}.gate.weight"] = x[: 2 * G]
                found[layer + "self_attn.value_gate.weight"] = x[2 * G :]
            else:
                found[layer + INSIDE[rest]] = x
    return found


def build(case: Case, dtype: torch.dtype, weights: Tensors) -> ut.UndertowForCausalLM:
    tables = "bfloat16" if dtype == torch.float32 else "exact"  # as `undertow import` has them, and without rounding
    config = AutoConfig.for_model(**case.ours["backbone"], rotary_tables=tables)
    time = case.ours["time"] and Method.from_dict(case.ours["time"], "time")
    return fill(ut.from_scratch(config, time=time).to(dtype), ours(case, weights))


def expected(case: Case, wanted: Tensors) -> Tensors:
    """The golden outputs, gradients under our names."""
    found = {key: x for key, x in wanted.items() if not key.startswith("grad")}
    for tag in {key.split("/")[0] for key in wanted if key.startswith("grad")}:
        theirs = {key.split("/", 1)[1]: x for key, x in wanted.items() if key.startswith(tag + "/")}
        found |= {f"{tag}/{name}": x for name, x in ours(case, theirs).items()}
    return found


def _gradients(model, tag: str) -> Tensors:
    pairs = model.named_parameters()
    return {f"{tag}/{n}": torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in pairs}


def outputs(case: Case, dtype: torch.dtype, weights: Tensors, inputs: Tensors, wanted: Tensors) -> dict:
    model, x = build(case, dtype, weights).train(), inputs["input_ids"]
    if case.ours["time"] is None:
        out = model(x, labels=x)
        out.loss.backward()
        return {"logits": out.logits, "loss": out.loss, **_gradients(model, "grad")}
    found: dict = {}
    with torch.no_grad():
        found["logits_zero_memory"] = model(x, schedule=ut.Jacobi(0)).logits
        found["logits_sequential"] = [model.eval()(x, schedule=s).logits for s in (ut.Sequential(), ut.Converge())]
        model.train()
        for K in (1, 3):
            out = model(x, labels=x, schedule=ut.Jacobi(K, loss="mean"))
            found |= {f"logits_multi_refine_K{K}": out.logits, f"losses_multi_refine_K{K}": out.sweep_losses}
    for S in (2, 4):
        for refresh in (False, True):
            tag = f"interleaved_S{S}" + ("_refresh" if refresh else "")
            model.zero_grad()
            out = model(x, labels=x, schedule=ut.Interleaved(S, refresh=refresh))
            out.loss.backward()
            found |= {f"logits_{tag}": out.logits, f"loss_{tag}": out.loss, f"losses_{tag}": out.sweep_losses}
            found |= _gradients(model, f"grad_{tag}")
    return found
