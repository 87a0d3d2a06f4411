"""TRM (arXiv 2510.04871, release e7b6871, and adam-atan2 0.0.3) in our words: names, models and outputs."""

from __future__ import annotations

import re

import torch

from golden.cases import Case, Tensors, fill
from undertow.trm import halting, optimisers
from undertow.trm.config import TRMConfig
from undertow.trm.ema import EMA
from undertow.trm.losses import losses, stablemax
from undertow.trm.model import TRM
from undertow.trm.puzzle_embeddings import PuzzleEmbeddings

FLAT = {
    "embed_tokens.embedding_weight": "tokens.weight",
    "embed_pos.embedding_weight": "positions.weight",
    "lm_head.weight": "head.weight",
    "q_head.weight": "q_head.weight",
    "q_head.bias": "q_head.bias",
    "puzzle_emb.weights": "puzzles.table",
    "H_init": "start_y",
    "L_init": "start_z",
    **{f"L{i + 1}_init": f"start_z{i}" for i in range(6)},
}
INSIDE = {
    "self_attn.qkv_proj": "mix.qkv",
    "self_attn.o_proj": "mix.out",
    "mlp_t.gate_up_proj": "mix.gate_up",
    "mlp_t.down_proj": "mix.down",
    "mlp.gate_up_proj": "mlp.gate_up",
    "mlp.down_proj": "mlp.down",
}
STATES = {"z_H": "y", "z_L": "z", **{f"z_L{i + 1}": f"z{i}" for i in range(6)}}


def ours(name: str) -> str:
    """Our name of one of their tensors, compiled or not."""
    bare = name.removeprefix("_orig_mod.").removeprefix("model.inner.")
    if bare in FLAT:
        return FLAT[bare]
    m = re.fullmatch(r"([LH])_level\.layers\.(\d+)\.(.*)\.weight", bare)
    return f"blocks.{'high' if m[1] == 'H' else 'block'}_{m[2]}.{INSIDE[m[3]]}.weight"


def build(case: Case, dtype: torch.dtype, weights: Tensors) -> TRM:
    config = TRMConfig(**case.ours["network"])
    model = fill(TRM(config).to(dtype), {ours(name): x for name, x in weights.items()})
    if dtype == torch.float64 and config.positions == "rope" and config.mixing == "attention":  # tables never rounded
        E = config.width // config.heads
        powers = torch.arange(0, E, 2, dtype=dtype) / E
        angle = torch.outer(torch.arange(config.tokens, dtype=dtype), 10000.0**-powers).repeat(1, 2)
        for block in model.blocks.values():
            block.rotary.cos, block.rotary.sin = angle.cos(), angle.sin()
    return model.train()


def expected(case: Case, wanted: Tensors) -> Tensors:
    """The golden outputs, but for a trajectory that is no published one (`inside`)."""
    return {key: x for key, x in wanted.items() if key != "inside"}


def outputs(case: Case, dtype: torch.dtype, weights: Tensors, inputs: Tensors, wanted: Tensors) -> dict:
    parts = {
        "adam_atan2": _trajectory,
        "sparse_sign_sgd": _signs,
        "ema": _averages,
        "stablemax": _stablemax,
        "learning_rate": _rates,
    }
    name = case.name.split("/")[1]
    if name in parts:
        return parts[name](case.settings, inputs, dtype)
    model = build(case, dtype, weights)
    return (
        _trained(case.settings, model, inputs, wanted)
        if name == "three_training_steps"
        else _steps(model, inputs, wanted)
    )


# ---------------------------------------------------------------------- the model


def _supervise(model: TRM, carry, inputs: Tensors, s: int):
    """Supervision step s with backward: `(carry before halting, state, logits, q, losses, worth, vectors)`."""
    batch = {key: inputs[key][s] for key in ("inputs", "labels", "puzzle_identifiers")}
    carry = halting.admit(model, halting.first(model, batch) if carry is None else carry, batch)
    vectors = model.vectors(carry.data["puzzle_identifiers"])
    state, logits, q = model(carry.state, carry.data["inputs"], vectors)
    worth = halting.worth_of_going_on(model, carry, state, vectors) if model.config.q_learning else None
    found = losses(logits, q, carry.data["labels"], "stablemax", worth)
    found.loss.backward()
    return carry, state, logits, q, found, worth, vectors


def _steps(model: TRM, inputs: Tensors, wanted: Tensors) -> dict:
    """Supervision steps with carry and halting, weights unchanged."""
    found, carry, own = {}, None, dict(model.named_parameters())
    single = model.config.variant == "singlez"
    for s in range(len(inputs["inputs"])):
        t = f"step{s + 1}/"
        model.zero_grad()
        carry, state, logits, q, made, worth, vectors = _supervise(model, carry, inputs, s)
        carry = halting.halt(model, carry, state, q, inputs["min_halt_steps"][s])
        done = carry.halted_B & made.labelled_B
        metrics = {
            "count": done.sum(),
            "accuracy": (made.accuracy_B * done).sum(),
            "exact_accuracy": (made.solved_B & done).sum(),
            "q_halt_accuracy": (((q[:, 0] >= 0) == made.solved_B) & done).sum(),
            "steps": (carry.steps_B * done).sum(),
            "lm_loss": made.cells_B.sum(),
            "q_halt_loss": made.halt_B.sum(),
            "q_continue_loss": made.go_on_B.sum(),
        }
        found |= {t + "loss": made.loss, t + "logits": logits, t + "q": q, t + "target_q_continue": worth}
        found |= {t + "halted": carry.halted_B, t + "steps": carry.steps_B}
        found |= {f"{t}metric/{key}": value for key, value in metrics.items()}
        found |= {f"{t}data/{key}": value for key, value in carry.data.items()}
        names = {"z_L": "z"} if single else {theirs: mine for theirs, mine in STATES.items() if mine in state}
        found |= {f"{t}state/{theirs}": state[mine] for theirs, mine in names.items()}
        for key in wanted:
            if key.startswith(t + "grad/"):
                name = key.removeprefix(t + "grad/")
                found[key] = (vectors if name == "puzzle_vectors" else own[ours(name)]).grad.clone()
    return found


def _trained(said, model: TRM, inputs: Tensors, wanted: Tensors) -> dict:
    """Three whole steps of training: network, puzzle embeddings, average."""
    carry, made, ema = None, [], EMA(model, said["ema_rate"])
    optimiser = optimisers.AdamATan2(
        model.parameters(), lr=said["lr"], betas=(said["beta1"], said["beta2"]), weight_decay=said["weight_decay"]
    )
    for s in range(len(inputs["inputs"])):
        carry, state, _, q, found, _, vectors = _supervise(model, carry, inputs, s)
        made.append(found.loss.detach())
        optimiser.step()
        optimiser.zero_grad()
        ids = carry.data["puzzle_identifiers"]
        model.puzzles.step(ids, vectors.grad, said["puzzle_emb_lr"], said["puzzle_emb_weight_decay"])
        ema.update(model)
        carry = halting.halt(model, carry, state, q, inputs["min_halt_steps"][s])
    where = {"after": model.state_dict(), "ema": ema.average}
    states = {key: where[key.split("/")[0]][ours(key.split("/", 1)[1])] for key in wanted if "/" in key}
    return {"loss": torch.stack(made), **states}


# ---------------------------------------------------------------------- its parts


def _trajectory(said, inputs: Tensors, dtype: torch.dtype) -> dict:
    p = torch.nn.Parameter(inputs["start"].to(dtype).clone())
    optimiser = optimisers.AdamATan2([p], lr=said["lr"], betas=tuple(said["betas"]), weight_decay=said["weight_decay"])
    made = []
    for g in inputs["gradients"]:
        p.grad = g.to(dtype).clone()
        optimiser.step()
        made.append(p.detach().clone())
    state = optimiser.state[p]
    return {"parameters": torch.stack(made), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def _signs(said, inputs: Tensors, dtype: torch.dtype) -> dict:
    puzzles, made = PuzzleEmbeddings(*inputs["table"].shape).to(dtype), []
    puzzles.table.copy_(inputs["table"])
    for ids, g in zip(inputs["ids"], inputs["gradients"], strict=True):
        puzzles.step(ids, g.to(dtype), said["lr"], said["weight_decay"])
        made.append(puzzles.table.clone())
    return {"table": torch.stack(made)}


def _averages(said, inputs: Tensors, dtype: torch.dtype) -> dict:
    found = {}
    for mu in said["mu"]:
        model, made = torch.nn.Module(), {"a": [], "b": []}
        for n in made:
            setattr(model, n, torch.nn.Parameter(inputs[n][0].to(dtype).clone()))
        ema = EMA(model, mu)
        for k in (1, 2, 3):
            for n in made:
                getattr(model, n).data.copy_(inputs[n][k])
            ema.update(model)
            for n, seen in made.items():
                seen.append(ema.average[n].clone())
        found |= {f"mu{mu}/{n}": torch.stack(seen) for n, seen in made.items()}
    return found


def _stablemax(said, inputs: Tensors, dtype: torch.dtype) -> dict:
    logits = inputs["logits"].to(dtype).clone().requires_grad_()
    loss = stablemax(logits, inputs["labels"])
    loss.sum().backward()
    return {"loss": loss, "grad": logits.grad}


def _rates(said, inputs: Tensors, dtype: torch.dtype) -> dict:
    total, warm = said["total_steps"], said["lr_warmup_steps"]
    rates = [[optimisers.rate(k, total, warm, least) for k in range(1, 13)] for least in said["lr_min_ratio"]]
    return {"rate": torch.tensor(rates, dtype=torch.float64)}
