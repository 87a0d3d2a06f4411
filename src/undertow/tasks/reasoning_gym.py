"""reasoning-gym (arXiv 2505.24760): about a hundred generators of problems, each with its own scorer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from undertow.tasks.base import Example, Generated, Record

_INSTALL = "it is not installed: pip install reasoning-gym, in an environment of its own (its pins clash with ours)"


@dataclass(frozen=True)
class ReasoningGym(Generated):
    """Any data set of reasoning-gym (to be installed apart).

    It is scored by its own scorer.

    An item is drawn as the only one of a data set with a seed of its own: items of one data set follow from
    consecutive seeds, so that two data sets with close seeds would share most of theirs.

    Args:
        train, validation, test, seed: see `Generated`.
        dataset: its name there.
        config: its options there.
    """

    dataset: str = "gsm_symbolic"
    config: dict[str, Any] = field(default_factory=dict)

    def draw(self, rng: random.Random, split: str) -> Record:
        seed = rng.getrandbits(31)
        item = self._source(seed)[0]
        if not isinstance(item["answer"], str):
            raise ValueError(f"ReasoningGym dataset={self.dataset!r}: its items have no answer to train on")
        return {"question": item["question"], "answer": item["answer"], "seed": seed}

    def example(self, record: Record) -> Example:
        return Example(f"{record['question']}\n\n", record["answer"])

    def correct(self, record: Record, text: str) -> bool:
        # The item itself, not what JSON would have made of its metadata.
        source = self._source(record["seed"])
        return source.score_answer(text.strip(), source[0]) >= 1

    def key(self, record: Record) -> str:
        return record["question"]

    def _source(self, seed: int):
        try:
            from reasoning_gym import create_dataset
        except ImportError:
            raise ValueError(f"ReasoningGym dataset={self.dataset!r}: {_INSTALL}") from None
        try:
            return create_dataset(self.dataset, size=1, seed=seed, **self.config)
        except (ValueError, TypeError, AssertionError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"ReasoningGym dataset={self.dataset!r}, config={self.config}: {said}") from None
