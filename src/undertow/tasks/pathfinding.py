"""Pathfinding: the shortest path between two nodes of a directed acyclic graph (T2MLR, arXiv 2607.15178).

A backbone of n edges leads from the start to the end. Each lane leaves it at one of its nodes 0..n//2 and joins it
again at one of n//2+1..n-1, by a way that is longer than the part it goes round. So the backbone is the only shortest
path. Dead ends hang off everything but the end.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise

from undertow.tasks.base import Example, Generated, Record
from undertow.tasks.options import Range, check_choice, check_range, check_whole, pick

_SYLLABLES = [c + v for c in "bcdfglmnprstvz" for v in "aeiou"]
_FIRST = [""] * 7 * len(_SYLLABLES) + _SYLLABLES * 3  # three names in ten have a third syllable
_LAST = [syllable + consonant for syllable in _SYLLABLES for consonant in "xnrstlmv"]
_WALK = 30  # steps of a random walk, at most


@dataclass(frozen=True)
class Pathfinding(Generated):
    """Find the shortest path. Records have the published fields; edges are pairs of names.

    Args:
        backbone: edges of the shortest path.
        lanes: longer ways round a part of it.
        lane_extra: a lane has so many nodes more than the part it goes round has edges.
        dead_ends: probability that a dead end starts at a node.
        dead_end_depth: nodes of a dead end.
        wait: the word Wait and a space go before the answer.
        walk: a random walk from the start and `|` go before the answer.
    """

    backbone: Range = (10, 18)
    lanes: int = 6
    lane_extra: Range = (1, 3)
    dead_ends: float = 0.2
    dead_end_depth: int = 2
    wait: bool = False
    walk: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, "lanes", least=0)
        check_range(self, "backbone", least=3 if self.lanes else 1)  # two edges leave lanes no node to join at
        check_range(self, "lane_extra", least=1)
        check_whole(self, "dead_end_depth", least=1)
        if not isinstance(self.dead_ends, int | float) or not 0 <= self.dead_ends <= 1:
            raise ValueError(f"Pathfinding dead_ends={self.dead_ends!r}: must be a number from 0 to 1")
        for name in ("wait", "walk"):
            check_choice(self, name, (True, False))

    def draw(self, rng: random.Random, split: str) -> Record:
        length = pick(rng, self.backbone)
        pairs, count = self._graph(rng, length)
        names = _names(rng, count)
        pairs.sort(key=lambda _: rng.random())  # a shuffle, in half the time
        edges = [[names[u], names[v]] for u, v in pairs]
        start, end, answer = names[0], names[length], " -> ".join(names[: length + 1])
        lines = "\n".join([f"{u} -> {v}" for u, v in edges])
        response = f"Wait {answer}" if self.wait else answer
        if self.walk:
            response = f"{' -> '.join(_walk(rng, edges, start))} | {response}"
        return {
            "question": (
                f"Find the shortest path in this directed graph.\nStart: {start}\nEnd: {end}\nEdges:\n{lines}\nAnswer: "
            ),
            "response": response,
            "answer": answer,
            "edges": edges,
            "start": start,
            "end": end,
            "meta": {
                "num_nodes": count,
                "shortest_length": length,
                "num_shortest_paths": 1,
                "backbone_length": length + 1,
            },
        }

    def _graph(self, rng: random.Random, length: int) -> tuple[list[tuple[int, int]], int]:
        """Edges and the number of nodes; nodes 0..length are the backbone."""
        edges = list(pairwise(range(length + 1)))
        count, half = length + 1, length // 2
        for _ in range(self.lanes):
            leave, join = rng.randint(0, half), rng.randint(half + 1, length - 1)
            after = count + join - leave + pick(rng, self.lane_extra)
            edges.extend(pairwise([leave, *range(count, after), join]))
            count = after
        draw, chance, depth = rng.random, self.dead_ends, self.dead_end_depth
        for node in range(count):
            if node != length and draw() < chance:
                edges.extend(pairwise([node, *range(count, count + depth)]))
                count += depth
        return edges, count

    def example(self, record: Record) -> Example:
        response = record.get("response") or record["answer"]
        prompt = record["question"] + "\n\n"  # as published for every prompt without a chat template
        return Example(prompt, response, f"{_path(response).count('->')} edges")

    def correct(self, record: Record, text: str) -> bool:
        """A path along edges from the start to the end, and none is shorter. What comes before the last `|` is free.

        Edges are pairs of names, or of numbers where the record has `idx_to_symbol`.
        """
        edges, start, end = _named(record)
        path = [name.strip() for name in _path(text).split("->")]
        return (
            path[0] == start
            and path[-1] == end
            and edges.issuperset(pairwise(path))
            and len(path) - 1 == _distance(edges, start, end)
        )

    def key(self, record: Record) -> Hashable:
        """The two nodes and the edges in any order. Other names make another problem: names are what is read."""
        edges, start, end = _named(record)
        return start, end, *sorted([f"{u} {v}" for u, v in edges])


def _names(rng: random.Random, count: int) -> list[str]:
    """Different names of two or three syllables and a consonant."""
    names: dict[str, None] = {}
    while missing := count - len(names):
        first, middle = rng.choices(_FIRST, k=missing), rng.choices(_SYLLABLES, k=missing)
        last = rng.choices(_LAST, k=missing)
        names.update(dict.fromkeys([a + b + c for a, b, c in zip(first, middle, last, strict=True)]))
    return list(names)


def _walk(rng: random.Random, edges: list[list[str]], start: str) -> list[str]:
    following = defaultdict(list)
    for u, v in edges:
        following[u].append(v)
    path = [start]
    while len(path) <= _WALK and path[-1] in following:
        path.append(rng.choice(following[path[-1]]))
    return path


def _path(text: str) -> str:
    """The answer in a response: what is after the last `|`, without `Wait`."""
    return text.rpartition("|")[2].strip().removeprefix("Wait ")


def _named(record: Record) -> tuple[set[tuple[str, str]], str, str]:
    """Edges, start and end as names."""
    edges, start, end = record["edges"], record["start"], record["end"]
    if symbols := record.get("idx_to_symbol"):
        return {(symbols[u], symbols[v]) for u, v in edges}, symbols[start], symbols[end]
    return {(u, v) for u, v in edges}, start, end


def _distance(edges: set[tuple[str, str]], start: str, end: str) -> int | None:
    """Edges of a shortest path; None if there is no path."""
    following = defaultdict(list)
    for u, v in edges:
        following[u].append(v)
    front, seen, distance = {start}, {start}, 0
    while front:
        if end in front:
            return distance
        front = {v for u in front for v in following[u]} - seen
        seen |= front
        distance += 1
    return None
