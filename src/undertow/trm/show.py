"""What a recipe of puzzles computes: the recursion, parameters, blocks and FLOPs of a supervision step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from rich.console import Group
from rich.text import Text
from torch.utils.flop_counter import FlopCounterMode

from undertow.analysis.show import drawn, picture_table, short, table_of
from undertow.trm.config import TRMConfig
from undertow.trm.model import TRM
from undertow.trm.recipe import PuzzleRecipe, title


@dataclass(frozen=True)
class Cost:
    """One supervision step of one puzzle: blocks run without and with gradient, FLOPs of evaluation and of training.

    FLOPs are those of the matrix products, as torch counts them; the training's are of forward and backward.
    """

    without: int
    live: int
    forward: float
    training: float


def on_meta(recipe: PuzzleRecipe, num_identifiers: int = 1) -> TRM:
    """The model of a recipe without weights; how many puzzles have vectors is known when the data is open."""
    source = recipe.puzzle
    sizes = {"vocab_size": source.vocab_size, "seq_len": source.seq_len, "num_identifiers": num_identifiers}
    with torch.device("meta"):
        return TRM(TRMConfig(**recipe.network.model_dump(), **sizes))


def cost(model: TRM) -> Cost:
    """What a step of a model on the meta device costs."""
    steps = [step.grad for step in model.program.steps]

    def step():
        cells = torch.zeros(1, model.config.seq_len, dtype=torch.int64, device="meta")
        vectors = model.vectors(cells[:, 0])
        state, logits, q = model(model.start(1), cells, vectors)
        if model.config.q_learning and torch.is_grad_enabled():
            with torch.no_grad():
                model(state, cells, vectors)  # what going on is worth
        return logits.sum() + q.sum()

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        step()
    with FlopCounterMode(display=False) as training:
        step().backward()
    return Cost(steps.count(False), steps.count(True), forward.get_total_flops(), training.get_total_flops())


def parameters(model: TRM) -> list[tuple[str, int]]:
    """Of every part, the total last. The puzzles' vectors are no parameters, and not in it."""
    found = Counter[str]()
    for name, parameter in model.named_parameters():
        found[".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])] += parameter.numel()
    return [*found.items(), ("all", sum(found.values()))]


def render(recipe: PuzzleRecipe) -> Group:
    """What a recipe is, for `rich.console.Console.print`."""
    model, settings = on_meta(recipe), recipe.training
    config, costs = model.config, cost(model)
    mixing = "MLPs over positions" if config.mixing == "mlp" else f"{config.heads} heads"
    sizes = f"{config.seq_len} cells after {config.prefixed} tokens for the puzzle, vocabulary {config.vocab_size}"
    said = f"{title(recipe.puzzle)}: {sizes}; {config.variant}, width {config.width}, {mixing}"
    run = f"{settings.steps:,} steps of {settings.batch_size} puzzles, each puzzle at most {config.max_steps} times"
    rows = [replace(row, slots="") for row in drawn(model, model.recursion.plan)]

    counts = table_of("parameters", "")
    for name, number in parameters(model):
        counts.add_row(name, f"{number:,}", style="bold" if name == "all" else "")
    made = table_of("a supervision step of one puzzle", "blocks", "FLOPs")
    whole = costs.without + costs.live
    made.add_row("evaluation", f"{whole}", short(costs.forward))
    made.add_row(f"training: {costs.live} of {whole} with gradient", f"{whole}", short(costs.training))
    for table in (counts, made):
        for column in table.columns[1:]:
            column.justify = "right"
    total = f"{costs.training * settings.steps * settings.batch_size:.3g}"
    return Group(
        *(Text(recipe.name, "bold"), Text(said), Text()),
        *(picture_table(rows), Text(), counts, Text(), made, Text(f"in all {run}: {total} FLOPs")),
    )
