"""Interleaved against exact sequential training: hidden states, per-token losses and gradients.

`python comparisons/lrt_exact.py RUNS OUT` reads the runs of comparisons/lrt_exact.yaml and writes OUT.json and OUT.png.
For each trained model, on validation rows, in float32:

- states: how far the memories that the training schedule computes are from the model's true ones (relative), and the
  two distributions: mean and deviation of the norms, participation ratio (the effective number of dimensions) and the
  Fréchet distance of Gaussians fitted to both, relative to the variance.
- losses: nats of every token under the schedule, and under true decoding of both models: means, their difference,
  its deviation over tokens, and their correlation.
- gradients: of the interleaved loss against the exact one, at the first step and at the end: relative distance, cosine.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import undertow as ut
from undertow.data import collate
from undertow.training import run as runs

SCHEDULES = {"interleaved": ut.Interleaved(2), "exact": ut.Sequential()}
ROWS = 256


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Nats of every predicted token, in a line."""
    targets = labels_BT[:, 1:].flatten()
    each = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets, reduction="none", ignore_index=-100)
    return each[targets != -100]


def shape_of(h_ND: Tensor) -> dict[str, float]:
    """The distribution of a set of states, in three numbers."""
    variance_D = torch.linalg.eigvalsh(torch.cov(h_ND.double().T)).clamp(min=0)
    norm_N = h_ND.norm(dim=-1)
    return {
        "norm_mean": float(norm_N.mean()),
        "norm_deviation": float(norm_N.std()),
        "participation_ratio": float(variance_D.sum() ** 2 / variance_D.square().sum()),
    }


def frechet(a_ND: Tensor, b_ND: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of states, relative to the variance of the second."""
    mean_D, (ca, cb) = (a_ND.mean(0) - b_ND.mean(0)).double(), (torch.cov(x.double().T) for x in (a_ND, b_ND))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return float((mean_D.square().sum() + ca.trace() + cb.trace() - 2 * cross) / cb.trace())


def gradient(model, batch, schedule) -> Tensor:
    """The gradient of the loss under a schedule, all parameters in a line."""
    model.train()
    model.zero_grad()
    model(**batch, schedule=schedule).loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.eval()
    return torch.cat([part.flatten() for part in parts])


def gradients(model, batch) -> dict[str, float]:
    g, true = (gradient(model, batch, schedule) for schedule in SCHEDULES.values())
    return {
        "distance": float((g - true).norm() / true.norm()),
        "cosine": float(functional.cosine_similarity(g, true, 0)),
    }


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    seeds = sorted({path.name.rsplit("seed", 1)[1] for path in Path(folder).glob("*-seed*")})
    found: dict[str, list[dict]] = {name: [] for name in SCHEDULES}
    true_losses: dict[tuple[str, str], Tensor] = {}
    for seed in seeds:
        for name, schedule in SCHEDULES.items():
            place = Path(folder) / f"{name}-seed{seed}"
            loaded = runs.load(place, "cpu")
            data = runs.reopen(place, loaded.recipe)
            batch = collate([data.validation[i] for i in range(min(ROWS, len(data.validation)))])
            labels, model = batch.pop("labels"), loaded.model
            with torch.no_grad():
                true, got = model(**batch, schedule=ut.Sequential()), model(**batch, schedule=schedule)
            real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(labels).bool()
            states = [out.memory[real] for out in (got, true)]
            losses = [token_losses(out.logits, labels) for out in (got, true)]
            true_losses[name, seed] = losses[1]
            few = {key: value[:64] for key, value in batch.items()} | {"labels": labels[:64]}
            first = runs.build_model(loaded.recipe, loaded.tokenizer)
            found[name].append(
                {
                    "seed": int(seed),
                    "state_distance": float((states[0] - states[1]).norm() / states[1].norm()),
                    "frechet": frechet(*states),
                    "states_under_schedule": shape_of(states[0]),
                    "states_true": shape_of(states[1]),
                    "nats_under_schedule": float(losses[0].mean()),
                    "nats_true": float(losses[1].mean()),
                    "gap_deviation": float((losses[0] - losses[1]).std()),
                    "gradient_at_start": gradients(first, few),
                    "gradient_at_end": gradients(model, few),
                }
            )
            print(name, json.dumps(found[name][-1]), flush=True)
    between = [
        {
            "seed": int(seed),
            "difference": float((true_losses["interleaved", seed] - true_losses["exact", seed]).mean()),
            "deviation": float((true_losses["interleaved", seed] - true_losses["exact", seed]).std()),
            "correlation": float(torch.corrcoef(torch.stack([true_losses[name, seed] for name in SCHEDULES]))[0, 1]),
        }
        for seed in seeds
    ]
    command = f"python comparisons/lrt_exact.py {folder} {out}"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(
        json.dumps({"command": command, "models": found, "interleaved_minus_exact_true_nats": between}, indent=1)
    )
    draw(true_losses, seeds, Path(f"{out}.png"))
    gaps = [one["difference"] for one in between]
    print(f"decoded truly, interleaved - exact training: {statistics.mean(gaps):+.4f} nats a token ({gaps})")


def draw(losses, seeds, path: Path) -> None:
    """Every token's loss under one training against the other, and the distribution of the difference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    a, b = (torch.cat([losses[name, seed] for seed in seeds]) for name in ("exact", "interleaved"))
    left.hexbin(a.numpy(), b.numpy(), gridsize=60, bins="log", cmap="Blues")
    left.axline((0, 0), slope=1, color="black", linewidth=0.8)
    left.set_xlabel("nats of a token, trained exactly")
    left.set_ylabel("nats of the same token, trained interleaved")
    right.hist((b - a).numpy(), bins=100, color="C0")
    right.set_xlabel("difference of the two, both decoded truly")
    right.set_ylabel("tokens")
    figure.savefig(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
