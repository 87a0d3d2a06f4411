"""The tasks: one file each, a generator or loader, the prompt's format and the scorer.

undertow data S5 --out data/s5
data: {source: S5(retrieval=True)}        # in a recipe
"""

from __future__ import annotations

from undertow.tasks.base import SPLITS, Example, Generated, Record, Tags, Task

TASKS: dict[str, type[Task]] = {}  # by class name

__all__ = ["SPLITS", "TASKS", "Example", "Generated", "Record", "Tags", "Task"]
