"""Recipes of puzzles: sections `puzzle`, `network`, `training` and `evaluation`, checked as those of text are."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from undertow.recipe import Run, component
from undertow.recipe_base import Bad, choices, one_line
from undertow.recipe_sections import Positive, Section
from undertow.trm.config import PREFIX, Network
from undertow.trm.puzzles import PUZZLES, Cells, Folder, Source
from undertow.trm.settings import TRMTraining

Sure = Annotated[float, Field(gt=0, lt=1)]


class PuzzleEvaluation(Section):
    """How it is measured: on the first `puzzles` of the test split (None: on all).

    `sure`: how sure the halt head must be to stop early, as probabilities; a line of the table each.
    """

    puzzles: Positive | None = 1000
    batch_size: Positive = 100
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    sure: Annotated[tuple[Sure, ...], Field(strict=False, min_length=1)] = (0.5, 0.9, 0.99)


class PuzzleRecipe(Run):
    """One run on puzzles. `puzzle` is written as a call, a mapping or the path of a folder, and holds the source."""

    puzzle: Any
    network: Network = Network()
    training: TRMTraining = TRMTraining()
    evaluation: PuzzleEvaluation = PuzzleEvaluation()

    @field_validator("puzzle", mode="before")
    @classmethod
    def _source(cls, value):
        return source_of(value)

    @model_validator(mode="after")
    def _read(self):
        """Every key that is not left as it is, is read by what runs."""
        network = self.network
        for applies, where, section, keys in (
            (network.variant != "transformer", "variant: transformer", "network", ("inner", "outer")),
            (network.mixing != "mlp", "mixing: mlp", "network", ("heads",)),
            (network.vector > 0, "puzzle_width: 0", "network", ("prefix",)),
            (network.vector > 0, "puzzle_width: 0", "training", ("puzzle_learning_rate", "puzzle_decay")),
            (network.max_steps > 1, "max_steps: 1", "training", ("exploration",)),
        ):
            for key in () if applies else keys:
                held = getattr(self, section)
                untouched = (type(held).model_fields[key].default, *((PREFIX,) if key == "prefix" else ()))
                if (given := getattr(held, key)) not in untouched:  # the recipes of older runs say prefix: 16
                    raise Bad(f"{section}.{key}", f"{given!r}: does not apply to {where}; leave it out")
        return self

    @property
    def runner(self) -> ModuleType:
        from undertow.trm import run

        return run

    @property
    def common(self) -> dict[str, Any]:
        return {"puzzle": self.puzzle}  # steps may differ: at equal FLOPs a cheaper step gets more of them

    def to_dict(self) -> dict:
        source = self.puzzle
        plain = {
            "name": self.name,
            "seed": self.seed,
            "puzzle": source.path if isinstance(source, Folder) else source.to_dict(),
            **{section: getattr(self, section).model_dump() for section in ("network", "training", "evaluation")},
        }
        return json.loads(json.dumps(plain))  # tuples become lists, as YAML knows them


def source_of(value) -> Source:
    """The puzzles that a call (`Sudoku(size=4)`), a mapping (`{puzzle: Sudoku, size: 4}`) or a folder's path says.

    Raises:
        Bad: (a RecipeError) one line.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, str) and value not in PUZZLES and "(" not in value:
        if not Path(value).expanduser().is_dir():
            raise Bad("", f"{value!r}: neither a folder nor a puzzle; {choices(value, list(PUZZLES))}")
        try:
            return Folder(value)
        except (ValueError, OSError) as error:
            raise Bad("", one_line(error)) from error
    return component("puzzle", value)


def title(source: Source) -> str:
    """`Sudoku 4x4`; of puzzles of an unknown kind, the name of their folder."""
    if isinstance(source, Folder):
        if isinstance(source.source, Cells):
            return source.place.resolve().name
        source = source.source
    size = getattr(source, "size", None)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    return type(source).__name__ + ("" if size is None else f" {rows}x{columns}")
