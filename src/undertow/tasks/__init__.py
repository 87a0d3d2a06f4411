"""The tasks: one file each, a generator or loader, the prompt's format and the scorer.

undertow data S5 --out data/s5
data: {source: S5(retrieval=True)}        # in a recipe
"""

from __future__ import annotations

from undertow.tasks.base import SPLITS, Example, Generated, Record, Tags, Task
from undertow.tasks.pathfinding import Pathfinding
from undertow.tasks.prosqa import ProsQA
from undertow.tasks.s5 import S5
from undertow.tasks.variables import VariableAssignment

TASKS: dict[str, type[Task]] = {  # by class name
    "S5": S5,
    "VariableAssignment": VariableAssignment,
    "Pathfinding": Pathfinding,
    "ProsQA": ProsQA,
}

__all__ = ["SPLITS", "TASKS", "Example", "Generated", "Record", "Tags", "Task"]
