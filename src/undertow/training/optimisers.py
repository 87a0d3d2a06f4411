"""Which parameter gets which optimiser, learning rate and weight decay.

`adamw`     AdamW for everything.
`muon`      Muon (Jordan et al.) for the matrices inside the layers and our own, AdamW for embeddings, head, norms,
            biases and scalars. Muon's steps are scaled to AdamW's size, so that one learning rate serves both.
`nanochat`  the same division with the learning rates nanochat and LRT publish: see `nanochat_groups`.

In every group matrices decay and norms, biases and scalars do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback

from undertow.recipe import RecipeError, Training

OURS = "undertow."  # the prefix of every parameter that is not the backbone's


def build(model, settings: Training, batch_tokens: int) -> torch.optim.Optimizer:
    """The optimiser of a recipe's `training` section.

    Args:
        model: an `UndertowForCausalLM`.
        batch_tokens: tokens of one optimiser step (`nanochat` scales its learning rates by them).

    Raises:
        RecipeError: a pattern of `lr_groups` that matches no trainable parameter.
    """
    groups = parameter_groups(model, settings, batch_tokens)
    return torch.optim.AdamW(groups, fused=True) if settings.optimiser == "adamw" else MuonAdamW(groups)


def parameter_groups(model, settings: Training, batch_tokens: int) -> list[dict]:
    """Optimiser groups: parameters with equal options together, in the model's order. Arguments as `build`."""
    factors = multipliers([name for name, _ in trainable(model)], settings)
    if settings.optimiser == "nanochat":
        return nanochat_groups(model, batch_tokens, settings.learning_rate, settings.weight_decay, factors)
    hidden = hidden_matrices(model) if settings.optimiser == "muon" else set()

    def options(name: str, parameter: nn.Parameter) -> dict:
        common = {
            "lr": settings.learning_rate * factors[name],
            "weight_decay": settings.weight_decay if parameter.ndim >= 2 else 0.0,
        }
        if name in hidden:
            return common | {"muon": True, "adjust_lr_fn": "match_rms_adamw"}
        return common | {"muon": False, "betas": settings.value("betas"), "eps": 1e-8}

    return _grouped(model, options)


def multipliers(names: Sequence[str], settings: Training) -> dict[str, float]:
    """What multiplies each parameter's learning rate.

    That is the last pattern of `lr_groups` found in its name, else `recurrent_lr` for ours, else 1.

    Raises:
        RecipeError: a pattern found in no name.
    """
    found = {name: settings.recurrent_lr if name.startswith(OURS) else 1.0 for name in names}
    for pattern, factor in settings.lr_groups.items():
        matched = [name for name in names if re.search(pattern, name)]
        if not matched:
            raise RecipeError(
                f"training.lr_groups: {pattern!r} matches no trainable parameter; names are like {names[-1]!r}"
            )
        found.update(dict.fromkeys(matched, factor))
    return found


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require gradient; a tied one once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def hidden_matrices(model) -> set[str]:
    """Names of the matrices inside the layers and of our own; tables of embeddings are not among them."""
    inside = {id(p) for part in (model.view.layers, model.undertow) for p in part.parameters() if p.ndim == 2}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {name for name, parameter in trainable(model) if id(parameter) in inside - tables}


def _grouped(model, options) -> list[dict]:
    groups: dict[tuple, dict] = {}
    for name, parameter in trainable(model):
        chosen = options(name, parameter)
        groups.setdefault(tuple(chosen.items()), {"params": [], **chosen})["params"].append(parameter)
    return list(groups.values())


# ------------------------------------------------------------------ nanochat


@dataclass(frozen=True)
class Published:
    """AdamW's learning rate and betas for the parameters whose name holds `pattern`.

    `by_width`: times (width / 768)^-1/2.
    """

    pattern: str
    lr: float
    betas: tuple[float, float] = (0.8, 0.95)
    by_width: bool = False


MATRIX_LR, BATCH_TOKENS, WIDTH = 0.02, 1 << 19, 768  # what the published rates belong to
NANOCHAT = (  # the last one that matches holds
    Published(r"", 0.005),  # ours: for norms, biases and scalars that the published models lack
    Published(r"embed_tokens\.|value_tables\.", 0.3, by_width=True),
    Published(r"lm_head\.", 0.004, by_width=True),
    Published(r"\.scale\.alpha$", 0.005),
    Published(r"\.scale\.beta$", 0.5, betas=(0.96, 0.95)),
    Published(r"^undertow\.residual_\d+\.scale$", 0.5),
)


def nanochat_groups(
    model,
    batch_tokens: int,
    learning_rate: float = MATRIX_LR,
    weight_decay: float = 0.0,
    factors: dict[str, float] | None = None,
) -> list[dict]:
    """The groups of LRT's release (arXiv 2605.26797), an older nanochat: Muon for matrices, AdamW by `NANOCHAT`.

    All learning rates are times (batch_tokens / 2^19)^1/2. torch's Muon stands for the release's: it has neither its
    second moments nor its cautious decay.

    Args:
        batch_tokens: tokens of one optimiser step.
        learning_rate: of the matrices; the others keep their published ratio to it.
        weight_decay: of the matrices (published: 0.2 (12 / layers)^2, falling); nothing else decays.
        factors: name -> what multiplies its learning rate further.
    """
    hidden = hidden_matrices(model)
    scale = learning_rate / MATRIX_LR * (batch_tokens / BATCH_TOKENS) ** 0.5
    by_width = (model.view.shape.width / WIDTH) ** -0.5

    def options(name: str, parameter: nn.Parameter) -> dict:
        factor = scale * (1.0 if factors is None else factors[name])
        if name in hidden:
            rate = MATRIX_LR * factor
            return {"lr": rate, "weight_decay": weight_decay, "muon": True, "adjust_lr_fn": "original"}
        row = next(row for row in reversed(NANOCHAT) if re.search(row.pattern, name))
        rate = row.lr * factor * (by_width if row.by_width else 1.0)
        return {"lr": rate, "weight_decay": 0.0, "muon": False, "betas": row.betas, "eps": 1e-10}

    return _grouped(model, options)


class NanochatMuon(TrainerCallback):
    """nanochat's Muon over time: momentum 0.85 -> 0.95 in 300 steps, weight decay falling linearly to 0."""

    def __init__(self, weight_decay: float):
        self.weight_decay = weight_decay

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        done = state.global_step / state.max_steps
        for group in optimizer.param_groups:
            if group["muon"]:
                group["momentum"] = 0.85 + 0.10 * min(state.global_step / 300, 1.0)
                group["weight_decay"] = self.weight_decay * (1 - done)


# ------------------------------------------------------------------ Muon and AdamW as one


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the groups with `muon: True`, fused `torch.optim.AdamW` for the others.

    Groups and state are kept here, as in any optimiser: learning rate schedulers, `state_dict` and `load_state_dict`
    see one. The two inner ones only step.

    Args:
        groups: dicts with `params`, `lr`, `weight_decay`, `muon` and options of the optimiser that it names.
    """

    def __init__(self, groups: Sequence[dict]):
        groups = [dict(group) for group in groups]
        muon, adamw = ([group for group in groups if group["muon"] is kind] for kind in (True, False))
        self.inner = {True: torch.optim.Muon(muon), False: torch.optim.AdamW(adamw, fused=True)}  # fill in defaults
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, optimiser in self.inner.items():
            optimiser.param_groups = [group for group in self.param_groups if group["muon"] is kind]
            optimiser.state = self.state  # loading replaces groups and state: they are handed on at each step
            optimiser.step()
        return loss
