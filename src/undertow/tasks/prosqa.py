"""ProsQA: which of two concepts follows from a set of statements (Coconut, arXiv 2412.06769, appendix A.2).

Every gerpus is a brimpus. Tom is a terpus. Every terpus is a gerpus. ... Is Tom a brimpus or scrompus?

Tom is a terpus.
Every terpus is a gerpus.
Every gerpus is a brimpus.
### Tom is a brimpus.
"""

from __future__ import annotations

import glob
import hashlib
import random
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

from undertow.tasks import files as local
from undertow.tasks.base import SPLITS, Example, Generated, Record
from undertow.tasks.options import Range, check_range, check_whole, highest, pick

FIELDS = ("question", "steps", "answer", "edges", "idx_to_symbol")

_PEOPLE = [
    *("Alex", "Amy", "Ben", "Bob", "Carol", "Clara", "Dan", "Davis", "Eva", "Fae", "Fred", "Gina", "Grace", "Hank"),
    *("Iris", "Jack", "Jane", "Jerry", "Jill", "Kate", "Leo", "Lily", "Max", "Mia", "Ned", "Nora", "Oscar", "Pam"),
    *("Polly", "Quinn", "Rex", "Rosa", "Sally", "Sam", "Stella", "Tom", "Tina", "Uma", "Vera", "Victor", "Wren", "Zoe"),
]
_ONSETS = [*"bdfghjklnprstvwyz", "br", "dr", "fl", "gr", "scr", "sh", "st", "tr"]
_CONCEPTS = [f"{onset}{vowel}{coda}pus" for onset in _ONSETS for vowel in "aeiou" for coda in "mr"]
_STATEMENT = re.compile(r"(?:Every )?(\S+) is an? (\S+?)\.?")
_SECOND_PARENT = 0.75  # so that 23 nodes have about the published 36 edges
_HELD_OUT = 10  # of published files without a validation file, at most one record in so many validates


@dataclass(frozen=True)
class ProsQA(Generated):
    """Two families of concepts, one below each of two people; asked is which of two concepts one of them is.

    The two concepts are leaves, equally many steps below their people, and each family is made in the same way: only
    the chain of statements tells them apart. Concepts that belong to both families and further people connect them.
    Records have the published fields. The size of the splits is Coconut's.

    Args:
        hops: statements of the shortest chain, the first of them about the person.
        nodes: people and concepts, at least 2 * hops + 2. More of them, and longer chains, are harder.
        files: instead of drawing records, read published ones: a folder or a glob pattern; the files' names say
            `train`, `valid` or `test`. Then all of their records are used (test first; no problem is in two splits),
            and where no file is for validation, up to `validation` records of training, chosen by hash, are.
    """

    train: int = 17_886
    validation: int = 300
    test: int = 500
    hops: Range = (3, 5)
    nodes: int = 23
    files: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "hops", least=1)
        check_whole(self, "nodes", least=2 * highest(self.hops) + 2, most=len(_CONCEPTS))

    def draw(self, rng: random.Random, split: str) -> Record:
        hops = pick(rng, self.hops)
        edges, chain, (target, other), people = self._graph(rng, hops)
        concepts = rng.sample(_CONCEPTS, self.nodes - len(people))
        symbols = concepts + rng.sample(_PEOPLE, len(people))  # people have the last numbers
        first_person = people[0]
        rng.shuffle(edges)
        facts = [_statement(u, v, symbols, first_person) for u, v in edges]
        person, right, wrong = symbols[first_person], symbols[target], symbols[other]
        one, two = (right, wrong) if rng.random() < 0.5 else (wrong, right)
        return {
            "question": f"{' '.join(facts)} Is {person} a {one} or {two}?",
            "steps": [_statement(u, v, symbols, first_person) for u, v in chain],
            "answer": f"{person} is a {right}.",
            "edges": [[u, v] for u, v in edges],
            "root": first_person,
            "target": target,
            "neg_target": other,
            "idx_to_symbol": symbols,
        }

    def _graph(
        self, rng: random.Random, hops: int
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int], range]:
        """Edges, those of a shortest chain, the concept at its end and the other one, and the people's numbers.

        A family is a list of levels; a node of level l has a parent of level l-1 and perhaps another of that level or
        its own, so it is exactly l edges below the family's person.
        """
        spare = self.nodes - 2 * hops - 2
        more_people = min(spare // 5, len(_PEOPLE) - 2)
        count = self.nodes - 2 - more_people
        people = range(count, self.nodes)
        numbers = iter(range(count))
        families: list[list[list[int]]] = [[[person]] for person in people[:2]]
        for family in families:
            family += [[next(numbers)] for _ in range(hops)]
        shared = []
        for node in numbers:
            kind = rng.randrange(5)  # two in five in either family, one in both
            if kind < 4:
                families[kind % 2][rng.randint(1, hops)].insert(0, node)  # a leaf that is asked about stays the last
            else:
                shared.append(node)
        choice, chance = rng.choice, rng.random
        edges, parent = [], {}
        for family in families:
            for above, level in zip(family, family[1:], strict=False):
                for place, node in enumerate(level):
                    first = parent[node] = choice(above)
                    edges.append((first, node))
                    if chance() < _SECOND_PARENT and (second := choice(above + level[:place])) != first:
                        edges.append((second, node))
        targets = [family[-1].pop() for family in families]
        members = [[node for level in family for node in level] for family in families]
        for node in shared:
            parents = [choice(members[0]), choice(members[1]), choice(choice(members))]
            edges += [(first, node) for first in dict.fromkeys(parents)]
        for person in people[2:]:
            edges += [(person, concept) for concept in rng.sample(range(count), min(3, count))]
        chain, node = [], targets[0]
        while node in parent:
            chain.append((parent[node], node))
            node = parent[node]
        return edges, chain[::-1], targets, people

    def records(self, split: str) -> Iterator[Record]:
        if self.files is None:
            yield from super().records(split)
            return
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")
        paths = _files(self.files)
        seen: set[Hashable] = set()
        test = self._read(paths["test"], seen)
        if split != "test":
            validation = self._read(paths["valid"], seen)
            train = self._read(paths["train"], seen)
            if not paths["valid"]:
                by_hash = sorted(train, key=lambda record: _hash(self.key(record)))
                validation = by_hash[: min(self.validation, -(-len(train) // _HELD_OUT))]
                held_out = {self.key(record) for record in validation}
                train = [record for record in train if self.key(record) not in held_out]
        yield from test if split == "test" else validation if split == "validation" else train

    def _read(self, paths: list[Path], seen: set[Hashable]) -> list[Record]:
        """The records of files that are not in `seen`, where they are put."""
        records = []
        for path in paths:
            for number, record in enumerate(local.read(path, FIELDS), start=1):
                _check(record, f"{path}, record {number}")
                if (key := self.key(record)) not in seen:
                    seen.add(key)
                    records.append(record)
        return records

    def example(self, record: Record) -> Example:
        response = "\n".join([*record["steps"], f"### {record['answer']}"])
        return Example(record["question"] + "\n\n", response, f"{len(record['steps'])} hops")

    def correct(self, record: Record, text: str) -> bool:
        """After `###` the right statement; before it a chain of given statements that leads to it, one a line."""
        reasons, _, conclusion = text.rpartition("###")
        gold = _STATEMENT.fullmatch(record["answer"].strip())
        last = _STATEMENT.fullmatch(conclusion.strip())
        if gold is None or last is None or last.groups() != gold.groups():
            return False
        person, concept = gold.groups()
        symbols = record["idx_to_symbol"]
        given = {(symbols[u], symbols[v]) for u, v in record["edges"]}
        at = person
        for line in filter(None, map(str.strip, reasons.splitlines())):
            step = _STATEMENT.fullmatch(line)
            if step is None or step[1] != at or step.groups() not in given:
                return False
            at = step[2]
        return at == concept

    def key(self, record: Record) -> Hashable:
        """The statements and the two concepts in any order. Other names make another problem: they are what is read."""
        facts, _, asked = record["question"].strip().rpartition(". ")
        return tuple(sorted(facts.split(". "))), tuple(sorted(asked.rstrip("?").split()))


def _statement(u: int, v: int, symbols: list[str], first_person: int) -> str:
    return f"{symbols[u]} is a {symbols[v]}." if u >= first_person else f"Every {symbols[u]} is a {symbols[v]}."


def _files(where: str) -> dict[str, list[Path]]:
    """The files for each split, by their names."""
    folder = Path(where).expanduser()
    found = sorted(folder.glob("*.json*") if folder.is_dir() else map(Path, glob.glob(str(folder))))
    paths = {split: [path for path in found if split in path.name] for split in ("train", "valid", "test")}
    for split in ("train", "test"):
        if not paths[split]:
            raise ValueError(
                f"ProsQA files={where!r}: no file whose name says {split}; found: "
                f"{', '.join(path.name for path in found) or 'nothing'}"
            )
    return paths


def _check(record: Record, place: str) -> None:
    """Raise ValueError (one line) unless the fields are what the scorer reads."""
    symbols, edges = record["idx_to_symbol"], record["edges"]
    kinds = {"question": str, "steps": list, "answer": str, "edges": list, "idx_to_symbol": list}
    for field, kind in kinds.items():
        if not isinstance(record[field], kind):
            raise ValueError(f"{place}: {field} is {type(record[field]).__name__}, must be {kind.__name__}")
    for edge in edges:
        pair = isinstance(edge, list) and len(edge) == 2 and all(isinstance(end, int) for end in edge)
        if not pair or not all(0 <= end < len(symbols) for end in edge):
            raise ValueError(f"{place}: edges: {edge!r} is not a pair of numbers below {len(symbols)} (idx_to_symbol)")
    if not _STATEMENT.fullmatch(record["answer"].strip()):
        raise ValueError(f"{place}: answer: {record['answer']!r} does not read 'X is a Y.'")


def _hash(key: Hashable) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=12).digest()
