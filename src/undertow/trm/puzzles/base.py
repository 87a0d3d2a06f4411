"""What a source of puzzles is: sequences of S tokens to sequences of S labels, in groups of augmentations.

Token 0 pads, and as a label it is not scored. Names here: E examples, S cells of a sequence, P puzzles (a puzzle in one
form, with an identifier), G groups (all forms of a puzzle), A augmentations, B rows of a batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

PAD = 0
BLANK = "<blank>"  # the name of identifier 0: a puzzle that needs none, as a rule known to all
SPLITS = ("train", "test")
_ATTEMPTS = 1000  # draws in a row that give nothing new, before a generator is said to be exhausted
_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Group:
    """One puzzle in all its forms, the first as it came, then its augmentations.

    Attributes:
        inputs_ES, labels_ES: uint8, the examples of all forms, form by form.
        names_P: what each form's identifier stands for; None: one example a form, all of the blank identifier.
        sizes_P: examples of each form; None: one.
        rating: how hard it is, in the source's own measure.
    """

    inputs_ES: np.ndarray
    labels_ES: np.ndarray
    names_P: Sequence[str] | None = None
    sizes_P: Sequence[int] | None = None
    rating: float = 0


class Source:
    """Base of all sources: a frozen dataclass whose fields are its options."""

    @property
    def vocab_size(self) -> int:
        """Tokens, the padding counted."""
        raise NotImplementedError

    @property
    def seq_len(self) -> int:
        """S."""
        raise NotImplementedError

    def groups(self, split: str) -> Iterator[Group]:
        """The groups of `train` or `test`, the same ones every time.

        Raises:
            ValueError, OSError: one line: which option or file, its value, what is allowed.
        """
        raise NotImplementedError

    def files(self) -> list[Path]:
        """The files that are read: what they hold belongs to what this source is."""
        return []

    def parse(self, text: str) -> np.ndarray:
        """The input tokens (uint8, (S,)) of a puzzle written as text. Raises ValueError: one line."""
        raise NotImplementedError

    def render(self, tokens_S: np.ndarray) -> str:
        """Tokens, of an input or an answer, as lines for a terminal."""
        raise NotImplementedError

    def solve(self, inputs_S: np.ndarray) -> np.ndarray:
        """The right labels (uint8, (S,)), by search. Raises ValueError: there is none, more than one, or no solver."""
        raise ValueError(f"{type(self).__name__}: has no solver")

    def to_dict(self) -> dict:
        """`{"puzzle": name, option: value}`, as a recipe says it; defaults written out."""
        return {"puzzle": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")


def draw_apart(
    counts: dict[str, int], split: str, seed: int, draw: Callable[[random.Random], tuple[Hashable, T]]
) -> Iterator[T]:
    """What `draw` makes for one split; no key is in two splits, or twice in one.

    The test split is drawn first: how much is trained on changes nothing about what is tested.

    Args:
        counts: how many of each split.
        draw: makes a key and a thing.

    Raises:
        ValueError: one line: there are not so many keys.
    """
    check_split(split)
    seen: set[bytes] = set()
    for name in reversed(SPLITS):
        rng = random.Random(f"{seed}/{name}")
        for _ in range(counts[name]):
            for _ in range(_ATTEMPTS):
                key, made = draw(rng)
                known = hashlib.blake2b(repr(key).encode(), digest_size=12).digest()
                if known not in seen:
                    seen.add(known)
                    break
            else:
                raise ValueError(
                    f"{name}={counts[name]}: only {len(seen)} different puzzles were found (both splits together); "
                    "ask for fewer, or for others"
                )
            if name == split:
                yield made
        if name == split:
            return


def sample(items: Iterator[T], count: int, rng: random.Random) -> list[T]:
    """`count` of the items, every choice equally likely, in their order; all of them where there are no more."""
    kept: list[tuple[int, T]] = []
    for i, item in enumerate(items):
        if i < count:
            kept.append((i, item))
        elif (place := rng.randrange(i + 1)) < count:
            kept[place] = (i, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def dihedral(grid: np.ndarray, number: int) -> np.ndarray:
    """One of the 8 symmetries of the square, numbered as published: 0 none, 1-3 quarter turns, 4 left-right,
    5 up-down, 6 transpose, 7 the other diagonal. Grids are the last two axes."""
    turns, mirror = ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1), (1, 1))[number]
    turned = np.rot90(grid, turns, axes=(-2, -1))
    return turned[..., ::-1] if mirror else turned


def undo_dihedral(grid: np.ndarray, number: int) -> np.ndarray:
    return dihedral(grid, _INVERSE[number])
