"""What holds of every generated task."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from itertools import islice

import pytest
from task_checks import check_task

from undertow.tasks import S5, SPLITS, TASKS, Pathfinding, ProsQA, VariableAssignment

SIZES = {"train": 60, "validation": 60, "test": 60}
CASES = [
    S5(**SIZES),
    S5(retrieval=True, value_len=3, **SIZES),
    S5(retrieval=True, by="action", key_token=True, full_dict=True, **SIZES),
    VariableAssignment(**SIZES),
    VariableAssignment(form="math", depth=(0, 4), **SIZES),
    VariableAssignment(form="code", depth=1, test_depth=(5, 30), **SIZES),
    Pathfinding(**SIZES),
    Pathfinding(backbone=3, lanes=1, dead_ends=0, wait=True, walk=True, **SIZES),
    ProsQA(**SIZES),
    ProsQA(nodes=60, hops=(6, 10), **SIZES),
]


@pytest.mark.parametrize("task", CASES, ids=[f"{type(task).__name__}-{i}" for i, task in enumerate(CASES)])
def test_task(task):
    check_task(task)


def digest(task) -> str:
    records = [list(islice(task.records(split), 5)) for split in SPLITS]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def test_another_process_draws_the_same_records():
    """In the released pathfinding generator names came out of a set of strings, so every process drew others."""
    tasks = [task.to_dict() for task in CASES]
    code = (
        "import json, sys; sys.path.insert(0, 'tests/tasks'); from test_generators import TASKS, digest\n"
        "print(*[digest(TASKS[o.pop('task')](**o)) for o in json.loads(sys.argv[1])])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(tasks)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    ours = [digest(TASKS[options.pop("task")](**options)) for options in tasks]
    assert run.stdout.split() == ours


def test_options_written_and_read_back_make_an_equal_task():
    for task in CASES:
        options = json.loads(json.dumps(task.to_dict()))
        assert TASKS[options.pop("task")](**options) == task


def test_another_seed_draws_other_records():
    for task in CASES:
        assert digest(dataclasses.replace(task, seed=1)) != digest(task)


def test_how_much_is_trained_on_changes_nothing_about_the_test():
    few, many = S5(train=10, test=5), S5(train=500, test=5)
    assert list(few.records("test")) == list(many.records("test"))
    assert list(few.records("train")) == list(many.records("train"))[:10]


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (S5, {"actions": 1, "validation_actions": 1, "test_actions": 1}),  # 120 permutations
        (VariableAssignment, {"n_base": 1, "depth": 0, "distractors": 0}),  # 26 names, 10 digits
    ],
)
def test_no_leakage_where_every_problem_is_drawn(make, problems):
    """All problems there are, shared out among the splits: each is in one of them, and one more is refused."""
    total = 120 if make is S5 else 260
    sizes = {"train": total - 60, "validation": 20, "test": 40}
    task = make(**sizes, **problems)
    keys = [task.key(record) for split in SPLITS for record in task.records(split)]
    assert len(keys) == len(set(keys)) == total
    with pytest.raises(ValueError, match=f"only {total} different problems were found"):
        list(make(**{**sizes, "train": total - 59}, **problems).records("train"))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (S5, {"actions": (3, 1)}, r"actions=\(3, 1\): must be a whole number of at least 1, or a pair"),
        (S5, {"test_actions": 0}, "test_actions=0"),
        (S5, {"by": "key", "retrieval": True}, "by='key': allowed: state, action"),
        (S5, {"retrieval": "no"}, "retrieval='no': allowed: True, False"),
        (S5, {"retrieval": True, "value_len": 0}, "value_len=0: must be a whole number of at least 1"),
        (S5, {"retrieval": True, "dict_size": 121}, "dict_size=121: must be a whole number from 1 to 120"),
        (S5, {"full_dict": True}, "full_dict=True: needs retrieval=True"),
        (S5, {"retrieval": True, "key_token": True}, "key_token=True: needs by='action'"),
        (S5, {"test": -1}, "test=-1"),
        (VariableAssignment, {"depth": -1}, "depth=-1"),
        (VariableAssignment, {"depth": True}, "depth=True"),
        (VariableAssignment, {"depth": [1, 2, 3]}, r"depth=\[1, 2, 3\]"),
        (VariableAssignment, {"n_base": 0}, "n_base=0"),
        (VariableAssignment, {"distractors": -1}, "distractors=-1"),
        (VariableAssignment, {"form": "prose"}, "form='prose': allowed: basic, math, code"),
        (Pathfinding, {"backbone": 2}, "backbone=2: must be a whole number of at least 3"),
        (Pathfinding, {"lanes": 1.5}, "lanes=1.5"),
        (Pathfinding, {"lane_extra": 0}, "lane_extra=0"),
        (Pathfinding, {"dead_ends": 1.1}, "dead_ends=1.1: must be a number from 0 to 1"),
        (Pathfinding, {"dead_end_depth": 0}, "dead_end_depth=0"),
        (Pathfinding, {"wait": "yes"}, "wait='yes'"),
        (ProsQA, {"nodes": 11}, "nodes=11: must be a whole number from 12 to"),
        (ProsQA, {"hops": 0}, "hops=0"),
    ],
)
def test_a_wrong_option_is_one_line(make, options, message):
    with pytest.raises(ValueError, match=f"^{make.__name__} {message}") as error:
        make(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "task", [VariableAssignment(), VariableAssignment(form="code"), Pathfinding(), ProsQA()], ids=repr
)
def test_a_blank_line_stands_before_the_response(task):
    """As published for every prompt without a chat template; records keep the published fields."""
    example = task.example(next(iter(task.records("validation"))))
    assert example.prompt.endswith("\n\n") and not example.prompt.endswith("\n\n\n") and example.response.strip()
