"""Pathfinding: one shortest path, and a scorer that accepts it."""

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.tasks import Pathfinding


def following(record):
    graph = defaultdict(list)
    for u, v in record["edges"]:
        graph[u].append(v)
    return graph


def shortest_paths(graph, start, end):
    """Length and number of the shortest paths, by breadth-first search that counts ways."""
    ways, seen, length = Counter({start: 1}), {start}, 0
    while ways and end not in ways:
        after = Counter()
        for u, count in ways.items():
            for v in graph[u]:
                if v not in seen:
                    after[v] += count
        seen |= set(after)
        ways, length = after, length + 1
    return length, ways[end]


def is_acyclic(graph):
    state = {}

    def visit(u):
        if u not in state:
            state[u] = "open"
            acyclic = all(visit(v) for v in graph[u])
            state[u] = "done"
            return acyclic
        return state[u] == "done"

    return all(visit(u) for u in list(graph))


@settings(max_examples=40, deadline=None)
@given(
    backbone=st.integers(3, 20),
    lanes=st.integers(0, 8),
    extra=st.integers(1, 3),
    dead_ends=st.sampled_from([0, 0.2, 1]),
    depth=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_the_backbone_is_the_only_shortest_path(backbone, lanes, extra, dead_ends, depth, seed):
    task = Pathfinding(
        backbone=backbone, lanes=lanes, lane_extra=extra, dead_ends=dead_ends, dead_end_depth=depth, seed=seed, test=1
    )
    (record,) = task.records("test")
    graph = following(record)
    assert shortest_paths(graph, record["start"], record["end"]) == (backbone, 1)
    path = record["answer"].split(" -> ")
    assert len(path) == backbone + 1
    assert (path[0], path[-1]) == (record["start"], record["end"])
    assert all(v in graph[u] for u, v in pairwise(path))
    assert is_acyclic(graph)
    assert not graph[record["end"]]
    assert len({name for edge in record["edges"] for name in edge}) == record["meta"]["num_nodes"]
    assert len(record["edges"]) == len({tuple(edge) for edge in record["edges"]})


def test_size_of_the_published_graphs():
    metas = [record["meta"] for record in Pathfinding(test=300).records("test")]
    sizes = sorted(meta["num_nodes"] for meta in metas)
    assert 60 < sizes[15] < 75 and 115 < sizes[-15] < 140  # without the smallest and the largest twentieth
    assert {meta["shortest_length"] for meta in metas} == set(range(10, 19))


def test_without_dead_ends_all_but_the_end_go_on():
    (record,) = Pathfinding(dead_ends=0, test=1).records("test")
    graph = following(record)
    assert [name for edge in record["edges"] for name in edge if name not in graph] == [record["end"]] * len(
        [edge for edge in record["edges"] if edge[1] == record["end"]]
    )


def test_published_form():
    (record,) = Pathfinding(backbone=3, lanes=0, dead_ends=0, test=1).records("test")
    assert set(record) == {"question", "response", "answer", "edges", "start", "end", "meta"}
    lines = [f"{u} -> {v}" for u, v in record["edges"]]
    assert record["question"] == "\n".join(
        [
            "Find the shortest path in this directed graph.",
            f"Start: {record['start']}",
            f"End: {record['end']}",
            "Edges:",
            *lines,
            "Answer: ",
        ]
    )
    assert record["response"] == record["answer"] == " -> ".join(record["answer"].split(" -> "))
    assert Pathfinding().example(record).bucket == "3 edges"


def test_prefixes_are_free():
    task = Pathfinding(test=20, walk=True, wait=True)
    for record in task.records("test"):
        walk, divider, answer = record["response"].partition(" | ")
        assert divider and answer == f"Wait {record['answer']}"
        names, graph = walk.split(" -> "), following(record)
        assert names[0] == record["start"] and all(v in graph[u] for u, v in pairwise(names))
        assert len(names) <= 31
        assert task.correct(record, record["response"])
        assert not task.correct(record, f"{record['answer']} | {walk}") or walk == record["answer"]
        assert task.example(record).bucket == f"{record['meta']['shortest_length']} edges"


DIAMOND = {  # a -> b|c -> d, and the long way a -> e -> f -> d
    "question": "",
    "answer": "a -> b -> d",
    "edges": [["a", "b"], ["a", "c"], ["b", "d"], ["c", "d"], ["a", "e"], ["e", "f"], ["f", "d"]],
    "start": "a",
    "end": "d",
}
NUMBERED = {
    **DIAMOND,
    "edges": [["abcdef".index(u), "abcdef".index(v)] for u, v in DIAMOND["edges"]],
    "start": 0,
    "end": 3,
    "idx_to_symbol": list("abcdef"),
}


@pytest.mark.parametrize("record", [DIAMOND, NUMBERED], ids=["names", "numbers"])
def test_any_shortest_path_is_right(record):
    """The published scorer wants numbers and `idx_to_symbol`, which its generator does not write: it said 0 always."""
    task = Pathfinding()
    right = ["a -> b -> d", "a -> c -> d", "a->c->d", " Wait a -> b -> d\n", "a -> e | x | a -> b -> d"]
    wrong = ["a -> e -> f -> d", "a -> d", "a -> b", "b -> d", "a -> b -> d -> d", "a b d", "d", "|", "a -> b -> x"]
    assert all(task.correct(record, text) for text in right)
    assert not any(task.correct(record, text) for text in wrong)
    assert task.key(record) == task.key(DIAMOND)
    assert task.example(record).response == "a -> b -> d"


def test_the_order_of_the_edges_is_no_other_problem():
    task = Pathfinding()
    assert task.key({**DIAMOND, "edges": DIAMOND["edges"][::-1]}) == task.key(DIAMOND)
    assert task.key({**DIAMOND, "edges": DIAMOND["edges"][1:]}) != task.key(DIAMOND)
    assert task.key({**DIAMOND, "end": "f"}) != task.key(DIAMOND)
