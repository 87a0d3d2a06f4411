"""Variable assignment: follow a chain of aliases to a digit (T2MLR, arXiv 2607.15178).

c=7
f=c
k=f
k=___
Answer: | 7
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from undertow.tasks.base import Example, Generated, Record
from undertow.tasks.options import Range, check_choice, check_range, check_whole, pick

# What goes before the lines, how a line is written, what comes after them; as published.
_FORMS = {
    "basic": (
        "Variable assignment. Follow the assignments and fill in the blank.\n",
        "{}={}",
        "\n{}=___\nAnswer: | ",
    ),
    "math": (
        "A student writes down equations relating letter-variables.\n"
        "Each line means the left-hand side equals the right-hand side.\n",
        "{}={}",
        "\nQuestion: What is the numerical value of {}?\nAnswer: | ",
    ),
    "code": (
        "Consider this short Python program:\n\n",
        "{} = {}",
        "\n\nWhat is the value of {}?\nAnswer: | ",
    ),
}


@dataclass(frozen=True)
class VariableAssignment(Generated):
    """Digits under names, a chain of aliases from the name in question to one of them, and aliases beside it.

    No alias is in a cycle, and each leads to a digit: one that does not matter points at a name with a digit, at the
    chain or at another such alias made before it. (In the released generator they may form cycles, and with depth 0
    point at a name that has no line.)

    Args:
        train: records of the training split.
        depth: the chain has depth + 1 aliases; with depth 0 it has none, the name in question has its digit itself.
        test_depth: the same of the test; None: as in training. Validation is as training.
        form: `basic`, `math` or `code`: how a problem is worded.
        n_base: names with a digit.
        distractors: aliases that are not in the chain.
    """

    train: int = 200_000
    depth: Range = 2
    test_depth: Range | None = None
    form: Literal["basic", "math", "code"] = "basic"
    n_base: int = 8
    distractors: int = 6

    def __post_init__(self):
        super().__post_init__()
        for name in ("depth", "test_depth"):
            if getattr(self, name) is not None:
                check_range(self, name, least=0)
        check_choice(self, "form", tuple(_FORMS))
        check_whole(self, "n_base", least=1)
        check_whole(self, "distractors", least=0)

    def draw(self, rng: random.Random, split: str) -> Record:
        depth = pick(rng, self.depth if split != "test" or self.test_depth is None else self.test_depth)
        links = depth + 1 if depth else 0
        total = self.n_base + links + self.distractors
        names = rng.sample(_names(max(26, total)), total)
        base, known = names[: self.n_base], names[: self.n_base + links]
        digits = rng.choices(string.digits, k=self.n_base)
        sink = rng.randrange(self.n_base)
        chain = [*known[self.n_base :], base[sink]]
        pairs = [*zip(base, digits, strict=True), *itertools.pairwise(chain)]
        for name in names[len(known) :]:
            pairs.append((name, rng.choice(known)))
            known.append(name)
        rng.shuffle(pairs)
        before, line, after = _FORMS[self.form]
        return {
            "input": before + "\n".join([line.format(*pair) for pair in pairs]) + after.format(chain[0]),
            "target": digits[sink],
            "task": "variable_assignment",
            "meta": {
                "n_base": self.n_base,
                "depth": depth,
                "n_distractor_aliases": self.distractors,
                "value_range": [0, 9],
                "form": self.form,
                "query_var": chain[0],
                "sink_var": base[sink],
            },
        }

    def example(self, record: Record) -> Example:
        prompt = record["input"] + "\n\n"  # as published for every prompt without a chat template
        return Example(prompt, record["target"], f"depth {record['meta']['depth']}")

    def correct(self, record: Record, text: str) -> bool:
        return text.strip() == record["target"]

    def key(self, record: Record) -> Hashable:
        """The name in question and the lines in any order. Other names make another problem: names are what is read."""
        lines = record["input"].replace(" ", "").split("\n")
        return record["meta"]["query_var"], tuple(sorted([line for line in lines if "=" in line]))


@cache
def _names(count: int) -> list[str]:
    """a..z, aa..zz and so on."""
    lengths = itertools.count(1)
    words = (itertools.product(string.ascii_lowercase, repeat=length) for length in lengths)
    return ["".join(word) for word in itertools.islice(itertools.chain.from_iterable(words), count)]
