"""How a puzzle model is trained. Defaults are the published ones of Sudoku-Extreme (arXiv 2510.04871)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from undertow.recipe_sections import Fraction, Positive, Section

NotNegative = Annotated[float, Field(ge=0)]


class TRMTraining(Section):
    """One step is one supervision step of the whole batch.

    Attributes:
        batch_size: rows of a step, of all processes together.
        warmup: steps over which the learning rates rise; floor: where the cosine after it ends (1: constant).
        clip: largest norm of the gradient (0: not clipped).
        puzzle_learning_rate, puzzle_decay: of the puzzles' vectors (decay None: `weight_decay`).
        exploration: how often a row must go on for a drawn number of steps, whatever the halt head says.
        ema: decay of the averaged parameters, which are what is measured and kept (None: no average).
        evaluate_every: steps between measurements (0: at the end only).
        keep: checkpoints kept.
    """

    steps: Positive = 65_104
    batch_size: Positive = 768
    loss: Literal["stablemax", "softmax"] = "stablemax"
    optimiser: Literal["adamw", "adam_atan2"] = "adam_atan2"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    weight_decay: NotNegative = 1.0
    warmup: Annotated[int, Field(ge=0)] = 2000
    floor: Fraction = 1.0
    clip: NotNegative = 0.0
    puzzle_learning_rate: NotNegative = 1e-4
    puzzle_decay: NotNegative | None = None
    exploration: Fraction = 0.1
    ema: Annotated[float, Field(ge=0, lt=1)] | None = 0.999
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 10
    save_every: Positive = 500
    keep: Positive = 2
