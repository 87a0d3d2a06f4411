"""Variable assignment: every alias leads to a digit, the answer is the chain's."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.tasks import VariableAssignment


def lines(record):
    """Name -> what it is assigned; each name is assigned once."""
    pairs = re.findall(r"^([a-z]+) ?= ?([a-z0-9]+)$", record["input"], re.M)
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def resolve(assigned, name):
    """The digit a name leads to and the steps to it; KeyError where a name is undefined."""
    steps = 0
    while not name.isdigit():
        name, steps = assigned[name], steps + 1
        assert steps <= len(assigned), "a cycle"
    return name, steps


@settings(max_examples=60, deadline=None)
@given(
    depth=st.integers(0, 40),
    n_base=st.integers(1, 10),
    distractors=st.integers(0, 12),
    form=st.sampled_from(["basic", "math", "code"]),
    seed=st.integers(0, 999),
)
def test_aliases_end_in_digits_and_the_chain_in_the_answer(depth, n_base, distractors, form, seed):
    """In the released generator distractors may form cycles, or with depth 0 point at a name that has no line."""
    task = VariableAssignment(
        depth=depth, n_base=n_base, distractors=distractors, form=form, seed=seed, train=0, validation=0, test=3
    )
    for record in task.records("test"):
        assigned = lines(record)
        links = depth + 1 if depth else 0
        assert len(assigned) == n_base + links + distractors
        for name in assigned:
            resolve(assigned, name)
        asked = record["meta"]["query_var"]
        assert resolve(assigned, asked) == (record["target"], links + 1)
        assert assigned[record["meta"]["sink_var"]] == record["target"]
        assert re.search(rf"\b{asked}(=___|\?)\n", record["input"])
        assert record["input"].endswith("Answer: | ")


def test_distractors_point_anywhere():
    """At digits' names, into the chain and at each other."""
    kinds = Counter()
    for record in VariableAssignment(test=100).records("test"):
        assigned = lines(record)
        chain, name = [], record["meta"]["query_var"]
        while name in assigned:
            chain.append(name)
            name = assigned[name]
        for name, to in assigned.items():
            if name not in chain and not to.isdigit():
                kinds["chain" if to in chain else "digit" if assigned[to].isdigit() else "alias"] += 1
    assert sum(kinds.values()) == 600
    assert min(kinds[kind] for kind in ("chain", "digit", "alias")) > 50


def test_published_fields():
    record = next(VariableAssignment(seed=1).records("test"))
    assert set(record) == {"input", "target", "task", "meta"}
    meta = record["meta"]
    assert set(meta) == {"n_base", "depth", "n_distractor_aliases", "value_range", "form", "query_var", "sink_var"}
    assert (meta["n_base"], meta["depth"], meta["n_distractor_aliases"], meta["value_range"]) == (8, 2, 6, [0, 9])


def test_depths_and_buckets():
    task = VariableAssignment(train=60, validation=60, test=60, depth=(1, 3), test_depth=[2, 6])
    for split, depths in (("train", {1, 2, 3}), ("validation", {1, 2, 3}), ("test", {2, 3, 4, 5, 6})):
        assert {task.example(record).bucket for record in task.records(split)} == {f"depth {d}" for d in depths}


@pytest.mark.parametrize("form", ["basic", "math", "code"])
def test_the_order_of_the_lines_is_no_other_problem(form):
    task = VariableAssignment(form=form)
    record = next(task.records("test"))
    texts = record["input"].split("\n")
    places = [i for i, text in enumerate(texts) if re.fullmatch(r"[a-z] ?= ?[a-z0-9]", text)]
    assert len(places) == 17
    swapped, changed = texts.copy(), texts.copy()
    swapped[places[0]], swapped[places[1]] = texts[places[1]], texts[places[0]]
    changed[places[0]] = changed[places[0]][:-1] + ("z" if texts[places[0]][-1] != "z" else "y")
    assert task.key({**record, "input": "\n".join(swapped)}) == task.key(record)
    assert task.key({**record, "input": "\n".join(changed)}) != task.key(record)
    assert task.key({**record, "meta": {**record["meta"], "query_var": "?"}}) != task.key(record)


def test_only_the_digit_is_right():
    task = VariableAssignment()
    record = next(task.records("test"))
    gold = record["target"]
    assert task.correct(record, gold) and task.correct(record, f" {gold}\n")
    assert not any(task.correct(record, text) for text in ("", f"{gold}{gold}", f"{gold}.", f"a={gold}"))
