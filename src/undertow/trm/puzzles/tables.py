"""Puzzles from tables: a folder with a train and a test file of questions and answers, as published or anyone's.

What is tested on is not trained on: training rows whose question is in the test file too are left out, and counted.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from undertow.tasks import files
from undertow.trm.puzzles.base import SPLITS, sample

NAMES = {  # what a column may be called, capitals and blanks around it aside
    "question": ("question", "questions", "quiz", "quizzes", "puzzle", "puzzles"),
    "answer": ("answer", "answers", "solution", "solutions"),
    "rating": ("rating", "difficulty"),
}


class Row(NamedTuple):
    """A question and its answer, as the file has them, and where they stand. `rating`: None where there is none."""

    place: str
    question: str
    answer: str
    rating: float | None


class Choice(NamedTuple):
    """What a split is made of.

    Attributes:
        path: a folder with `train.csv` and `test.csv` (or .jsonl, .json, .parquet; .gz after the first three).
        counts: rows of each split, at most; chosen at random by `seed`.
        plain: a question as all spellings of it are written alike.
        least: rows rated lower are left out (0: none).
    """

    path: str
    counts: dict[str, int]
    seed: int
    plain: Callable[[str], str]
    least: int = 0

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, in the order of the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is none of puzzles, or no row is left. One line.
        """
        train, test = paths(self.path)
        rng = random.Random(f"{self.seed}/{split}")
        if split == "test":
            found = sample(self._rated(test), self.counts[split], rng)
        else:
            tested, both = {self.plain(row.question) for row in read(test)}, 0

            def apart() -> Iterator[Row]:
                nonlocal both
                for row in self._rated(train):
                    if self.plain(row.question) in tested:
                        both += 1
                    else:
                        yield row

            found = sample(apart(), self.counts[split], rng)
            if both and not found:
                raise ValueError(f"{train}: all {both:,} puzzles are in {test.name} too; nothing is left to train on")
            if both:
                left_out(train, both, f"are in {test.name} too")
        if not found:
            raise ValueError(
                f"{paths(self.path)[SPLITS.index(split)]}: no puzzle has a rating of at least {self.least}"
            )
        return found

    def _rated(self, path: Path) -> Iterator[Row]:
        for row in read(path):
            if self.least and row.rating is None:
                raise ValueError(f"{row.place}: has no rating, and rating={self.least} is asked for")
            if row.rating is None or row.rating >= self.least:
                yield row


def left_out(path: Path, count: int, why: str) -> None:
    """Say how many training puzzles are not trained on."""
    warnings.warn(f"{path}: {count:,} puzzles {why}: they are not trained on", stacklevel=3)


def paths(folder: str) -> list[Path]:
    """The files of both splits: the first kind of file that is there, else `SPLIT.csv`."""
    place = Path(folder).expanduser()
    named = [f"{suffix}{packed}" for suffix in (".csv", ".jsonl", ".json", ".parquet") for packed in ("", ".gz")]
    found = [[place / f"{split}{end}" for end in named if (place / f"{split}{end}").is_file()] for split in SPLITS]
    return [some[0] if some else place / f"{split}.csv" for some, split in zip(found, SPLITS, strict=True)]


def read(path: Path) -> Iterator[Row]:
    """The rows of a file. Raises ValueError, one line: a column is missing, a cell is empty or no number."""
    columns: dict[str, str] = {}
    for number, record in enumerate(files.read(path), start=1):
        columns = columns or _columns(path, record)
        place = f"{path}, record {number}"
        question, answer = (_text(record.get(columns[name])) for name in ("question", "answer"))
        if not question or not answer:
            raise ValueError(f"{place}: its {columns['answer' if question else 'question']} is empty")
        yield Row(place, question, answer, _rating(place, record.get(columns.get("rating", ""))))


def _columns(path: Path, record: dict) -> dict[str, str]:
    """Each column's name in the file."""
    there = {str(name).strip().lower(): name for name in record}
    found = {column: [there[n] for n in names if n in there] for column, names in NAMES.items()}
    for column in ("question", "answer"):
        if not found[column]:
            raise ValueError(
                f"{path}: lacks a column {' or '.join(NAMES[column])}; has {', '.join(map(str, record)) or 'none'}"
            )
    return {column: names[0] for column, names in found.items() if names}


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _rating(place: str, value: object) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if number != number:
        raise ValueError(f"{place}: its rating is {value!r}; must be a number")
    return number
