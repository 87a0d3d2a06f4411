"""ARC's answers from predictions in many forms: each is undone and votes; the most voted for are the attempts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from undertow.trm.puzzles.arc import FIRST_COLOUR, crop, original
from undertow.trm.puzzles.arc_files import SIDE
from undertow.trm.puzzles.store import PuzzleData

PASSES = (1, 2, 5, 10, 100, 1000)
ATTEMPTS = 2

Key = tuple[tuple[int, ...], bytes]  # a grid's shape and cells


@dataclass(frozen=True, eq=False)
class Vote:
    """What one form's prediction says, in the puzzle's own colours and orientation.

    Attributes:
        puzzle: its name.
        question: the key of the test grid.
        answer: the predicted grid, uint8 (rows, columns); 0 rows where no grid was predicted.
        halt: the halt head's probability.
    """

    puzzle: str
    question: Key
    answer: np.ndarray
    halt: float


@dataclass(frozen=True, eq=False)
class Candidate:
    """A grid that was voted for: how often, and the mean halt probability of those votes."""

    answer: np.ndarray
    count: int
    halt: float


@dataclass(frozen=True, eq=False)
class Score:
    """Results over the puzzles of a split.

    Attributes:
        passes: by k, how often a right answer is among the first k: a mean over puzzles, each the mean over its test
            pairs; one without a vote counts as wrong.
        attempts: by puzzle, for each test pair the first `ATTEMPTS` answers (fewer if fewer had votes).
    """

    passes: dict[int, float]
    attempts: dict[str, list[list[np.ndarray]]]


def key(grid: np.ndarray) -> Key:
    return grid.shape, np.ascontiguousarray(grid, dtype=np.uint8).tobytes()


def votes(
    data: PuzzleData,
    inputs_BS: np.ndarray,
    identifiers_B: np.ndarray,
    predictions_BS: np.ndarray,
    halt_logits_B: np.ndarray,
) -> list[Vote]:
    """The votes of one batch. They belong to one evaluation: nothing is kept from one to the next.

    Args:
        data: where the batch is from; rows of its blank identifier are padding.
        predictions_BS: tokens.
    """
    found = []
    halts = 1 / (1 + np.exp(-np.asarray(halt_logits_B, dtype=np.float64)))
    rows = zip(np.asarray(identifiers_B), crop(inputs_BS), crop(predictions_BS), halts, strict=True)
    for identifier, question, answer, halt in rows:
        if identifier != data.blank:
            name, (question, answer) = original(data.names[identifier], [question, answer])
            found.append(Vote(name, key(question), answer, float(halt)))
    return found


def rank(cast: Iterable[Vote]) -> dict[tuple[str, Key], list[Candidate]]:
    """For each puzzle and test grid the answers, by number of votes and then by their mean halt probability."""
    ballots: dict[tuple[str, Key], dict[Key, list[Vote]]] = {}
    for vote in cast:
        ballots.setdefault((vote.puzzle, vote.question), {}).setdefault(key(vote.answer), []).append(vote)
    return {
        asked: sorted(
            (Candidate(v[0].answer, len(v), sum(vote.halt for vote in v) / len(v)) for v in answers.values()),
            key=lambda candidate: (candidate.count, candidate.halt),
            reverse=True,
        )
        for asked, answers in ballots.items()
    }


def score(data: PuzzleData, cast: Iterable[Vote], passes: Sequence[int] = PASSES) -> Score:
    """Votes against the right answers: those of the puzzles of a test split that are in their own form.

    Test grids whose answer is not known get attempts, and count in no result.
    """
    ranked = rank(cast)
    solved: dict[int, list[float]] = {k: [] for k in passes}
    attempts: dict[str, list[list[np.ndarray]]] = {}
    for first in data.group_starts[:-1]:
        name = data.names[data.identifiers_P[first]]
        pairs = slice(data.puzzle_starts[first], data.puzzle_starts[first + 1])
        questions, answers = crop(data.inputs_ES[pairs]), crop(data.labels_ES[pairs])
        given = [[c.answer for c in ranked.get((name, key(question)), [])] for question in questions]
        attempts[name] = [candidates[:ATTEMPTS] for candidates in given]
        places = [
            next((i for i, grid in enumerate(candidates) if key(grid) == key(answer)), None)
            for candidates, answer in zip(given, answers, strict=True)
            if answer.size
        ]
        for k, results in solved.items() if places else ():
            results.append(sum(place is not None and place < k for place in places) / len(places))
    scored = {k: sum(results) / len(results) for k, results in solved.items() if results}
    return Score(scored, attempts)


def votable(data: PuzzleData) -> bool:
    """Whether a split is of ARC: its forms vote."""
    return data.num_identifiers > 1 and (data.seq_len, data.vocab_size) == (SIDE * SIDE, FIRST_COLOUR + 10)


def submission(found: Score) -> dict[str, list[dict[str, list]]]:
    """The attempts as Kaggle takes them: of every puzzle, for each test grid, `attempt_1` and `attempt_2`."""

    def both(grids: list[np.ndarray]) -> dict[str, list]:
        grids = [grid for grid in grids if grid.size] or [np.zeros((1, 1), np.uint8)]
        return {f"attempt_{i + 1}": grids[min(i, len(grids) - 1)].tolist() for i in range(ATTEMPTS)}

    return {name: [both(grids) for grids in asked] for name, asked in found.attempts.items()}
