"""T2MLR (arXiv 2607.15178, release 4510e81) in our words: names of tensors, the model of a case, and its outputs."""

from __future__ import annotations

import torch
from transformers import AutoConfig

import undertow as ut
from golden.cases import Case, Tensors, fill, widen
from undertow.analysis.readahead import cut
from undertow.methods.base import Method

MIXER = {  # inside their mixer -> inside ours; the first prefix that fits
    "recurrent_projection.weight": "memory_projection.weight",
    "recurrent_projection.net.": "memory_projection.net.",
    "recurrent_projection.scaling": "memory_projection.scale",
    "recurrent_gate_proj.": "memory_mixer.gate_m.",
    "input_gate_proj.": "memory_mixer.gate_x.",
    "rezero_gamma_recurrent_gate": "memory_mixer.scale_m",
    "rezero_gamma_input_gate": "memory_mixer.scale_x",
    "alpha_gate_proj.": "memory_mixer.gate.",
    "rezero_gamma": "memory_mixer.scale",
    "concat_projection.weight": "memory_mixer.map.weight",
    "recurrent_alpha": "memory_mixer.weight",
    "erg_r_proj.": "memory_mixer.gate_rho.",
    "erg_i_proj.": "memory_mixer.gate_i.",
    "erg_lambda_param": "memory_mixer.decay_D",
    "norm_x.": "memory_mixer.norm_x.",
    "norm_r.": "memory_mixer.norm_m.",
    "recurrent_projection.3.": "memory_mixer.norm.",  # CODI's: two linear maps and a norm
    "recurrent_projection.0.": "memory_mixer.net.0.",
    "recurrent_projection.2.": "memory_mixer.net.2.",
}
DEAD = {  # tensors that their own forward never reads, by mixer
    "gated": ("input_gate_proj", "rezero_gamma"),  # without an x branch, or without rezero
    "alpha_coupled": ("rezero_gamma",),
    "var_norm_gated": ("rezero_gamma",),
    "baseline_coconut": ("norm_x",),
    "baseline_codi": ("norm_x",),
}


def ours(name: str) -> str:
    """Our name of one of their tensors."""
    if name.startswith("ftp_heads."):
        deep = name.count(".") == 4
        return "undertow.future." + name.removeprefix("ftp_heads.").replace(".layers.", ".0." if deep else ".")
    name = name.removeprefix("t2mlr_model.")
    if "mixing_module." in name:
        rest = name.split("mixing_module.")[1]
        theirs = next(prefix for prefix in MIXER if rest.startswith(prefix))
        return "undertow." + MIXER[theirs] + rest.removeprefix(theirs)
    parts = name.split(".")  # a wrapped layer keeps its own tensors one level down
    return "backbone." + ".".join(p for i, p in enumerate(parts) if not (p == "model" and i and parts[i - 1].isdigit()))


def bare(name: str) -> str:
    """A name of ours without what `detach=True` puts around the map of the memory."""
    return name.replace("memory_projection.project.", "memory_projection.")


def build(case: Case, dtype: torch.dtype, weights: Tensors) -> ut.UndertowForCausalLM:
    said = case.ours
    config = AutoConfig.for_model(**said["backbone"], bos_token_id=1, eos_token_id=None, pad_token_id=0)
    model = ut.from_scratch(config, time=Method.from_dict(said["time"], "time"), future=said.get("future")).to(dtype)
    place = {bare(name): name for name in model.state_dict()}
    dead = DEAD.get(said["time"].get("mixer", "gated"), ())
    given = {}
    for name, x in weights.items():
        mine = place.get(ours(name), ours(name))
        if mine in place.values() or not any(part in name for part in dead):
            given[mine] = x
    fill(model, given, kept=tuple(name for name in place.values() if name.endswith("strength")))
    return widen(model) if dtype == torch.float64 else model


def expected(case: Case, wanted: Tensors) -> Tensors:
    return wanted


def _jacobi(K: int, **more) -> ut.Jacobi:
    return ut.Jacobi(K, start="unmixed", **more)


def _gradients(model, wanted: Tensors, prefix: str = "") -> Tensors:
    own = {bare(name): p.grad for name, p in model.named_parameters()}
    return {key: own[ours(prefix + key.removeprefix("grad/"))] for key in wanted if key.startswith("grad/")}


def outputs(case: Case, dtype: torch.dtype, weights: Tensors, inputs: Tensors, wanted: Tensors) -> dict:
    model, x, mask = build(case, dtype, weights), inputs["input_ids"], (inputs["control_flows"] > 1).long()
    if "head_losses" in wanted:
        return _heads(case, model, x, mask, inputs["labels"], wanted)
    if any("_skip" in key for key in wanted):
        return _cut(model, x, mask)
    found: dict = {}
    with torch.no_grad():
        for D in (1, 4):
            found[f"logits_D{D}"] = model.train()(x, memory_mask=mask, schedule=_jacobi(D)).logits
        exact = (ut.Sequential(), ut.Converge())
        found["logits_exact"] = [model.eval()(x, memory_mask=mask, schedule=s).logits for s in exact]
    model.train()
    loss = model(x, labels=inputs["labels"], memory_mask=mask, schedule=_jacobi(6, backward=4)).loss
    loss.backward()
    found |= {"loss": loss, **_gradients(model, wanted)}
    for tag, recurrent in (("decode", False), ("decode_recurrent_prompt", True)):
        if f"{tag}_ids" in wanted:
            found |= _decoded(model.eval(), inputs["prompt_ids"], recurrent, tag)
    return found


@torch.no_grad()
def _decoded(model, prompt: torch.Tensor, recurrent: bool, tag: str, steps: int = 6) -> dict:
    """Greedy ids and logits, one token at a time with a cache; ids by `generate` too."""
    mask = torch.full_like(prompt, int(recurrent))
    text, logits = prompt, []
    out = model(prompt, memory_mask=mask, use_cache=True)
    for step in range(steps):
        logits.append(out.logits[:, -1])
        new = logits[-1].argmax(-1, keepdim=True)
        text = torch.cat([text, new], 1)
        if step < steps - 1:
            out = model(new, past_key_values=out.past_key_values, use_cache=True)
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        do_sample=False,
        memory_mask=mask,
        pad_token_id=0,
    )
    return {f"{tag}_ids": [text, made], f"{tag}_logits": torch.stack(logits, 1)}


def _heads(case: Case, model, x, mask, labels, wanted: Tensors) -> dict:
    """Heads that predict tokens further ahead."""
    out = model.train()(x, labels=labels, memory_mask=mask, schedule=_jacobi(4))
    out.loss.backward()
    states: dict = {}
    block = model.backbone.model.layers[case.ours["future"]["source"]]
    hook = block.register_forward_hook(lambda m, i, y: states.update(h=y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        model.eval()(x, memory_mask=mask, schedule=_jacobi(4))
        hook.remove()
        logits = {f"head_logits_{j}": y for j, y in enumerate(model.undertow["future"](states["h"]))}
    return {"loss": out.loss, "head_losses": out.future_losses, **_gradients(model, wanted, "ftp_heads."), **logits}


@torch.no_grad()
def _cut(model, x, mask, ahead: int = 5) -> dict:
    """What the first layers alone predict, one to five tokens ahead."""
    found: dict = {}
    for skip in (0, 1):
        logits = cut(model.eval(), skip)(x, memory_mask=mask).logits
        p, n = logits.softmax(-1), x.shape[1] - ahead
        pairs = [p[:, :n].gather(-1, x[:, k : k + n, None])[..., 0] for k in range(1, ahead + 1)]
        found |= {f"logits_skip{skip}": logits, f"probabilities_skip{skip}": torch.stack(pairs, -1)}
    return found
