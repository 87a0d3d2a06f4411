"""GPT-2 with a TRM block (release 72493a6) in our words: names of tensors, the model of a case, and its outputs."""

from __future__ import annotations

import re

import torch
from transformers import AutoConfig

import undertow as ut
from golden.cases import Case, Tensors, fill
from undertow.methods.base import Method

INSIDE = {  # trm_block.reasoning.layers.N
    "attn.qkv_proj": "qkv",
    "attn.o_proj": "out",
    "mlp.down_proj": "down",
    "norm1": "norm_attention",
    "norm2": "norm_mlp",
}


def ours(tensors: Tensors) -> Tensors:
    """Their tensors, or gradients, under our names; linear maps of their GPT-2 are turned, as Hugging Face has them."""
    found: Tensors = {}
    for name, x in tensors.items():
        if name.startswith("gpt2."):
            turns = re.search(r"(c_attn|c_proj|c_fc)\.weight$", name)
            found["backbone." + name.removeprefix("gpt2.")] = x.T if turns else x
        elif m := re.fullmatch(r"trm_block\.z_([LH])_init", name):
            found[f"undertow.trm_start_{'z' if m[1] == 'L' else 'y'}.value_D"] = x
        elif name == "trm_block.gate":
            found["undertow.trm_gate.gate"] = x.reshape(1)
        else:
            m = re.fullmatch(r"trm_block\.reasoning\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
            block = f"undertow.trm_{m[1]}."
            if m[2] == "mlp.gate_up_proj":
                found |= {
                    f"{block}{part}.weight": half for part, half in zip(("gate", "up"), x.chunk(2, 0), strict=True)
                }
            else:
                found[f"{block}{INSIDE[m[2]]}.{m[3]}"] = x
    return found


def build(case: Case, dtype: torch.dtype, weights: Tensors, **depth) -> ut.UndertowForCausalLM:
    """`depth`: fields of the depth method to change."""
    said = case.ours["depth"]
    method = said and Method.from_dict(said | depth, "depth")
    model = ut.from_scratch(AutoConfig.for_model(**case.ours["backbone"]), depth=method).to(dtype)
    return fill(model, ours(weights))


def expected(case: Case, wanted: Tensors) -> Tensors:
    """The golden outputs, gradients under our names. `gate_raw` is an input: what the gate is set to."""
    found = {key: x for key, x in wanted.items() if not key.startswith("grad") and key != "gate_raw"}
    tag = "grad_causal" if case.ours["depth"] else "grad"
    theirs = {key.split("/", 1)[1]: x for key, x in wanted.items() if key.startswith(tag + "/")}
    return found | {f"{tag}/{name}": x for name, x in ours(theirs).items()}


def outputs(case: Case, dtype: torch.dtype, weights: Tensors, inputs: Tensors, wanted: Tensors) -> dict:
    x, model = inputs["input_ids"], build(case, dtype, weights).train()
    tag = "_causal" if case.ours["depth"] else ""
    out = model(x, labels=x)
    out.loss.backward()
    found = {f"logits{tag}": out.logits, f"loss{tag}": out.loss}
    for name, p in model.named_parameters():
        found[f"grad{tag}/{name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    if not tag:
        return found
    with torch.no_grad():
        found["logits_unpatched_T1"] = model(x[:, :1]).logits
        both = build(case, dtype, weights, prefix=True)  # their block attends in both directions
        found["logits_unpatched"] = both(x, prefix_mask=torch.ones_like(x)).logits
        gate, one, zero = model.undertow["trm_gate"], torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        opened = []
        for raw in wanted.get("gate_raw", ()):
            gate.gate.fill_(float(raw))
            opened.append(gate(one, zero, zero)[0])  # s of `s x + (1 - s) m`
            found["logits_causal_gate_start"] = model(x).logits
        return found | ({"gate_alpha": torch.stack(opened)} if opened else {})
