"""The tasks: one file each, a generator or loader, the prompt's format and the scorer.

undertow data S5 --out data/s5
data: {source: S5(retrieval=True)}        # in a recipe
"""

from __future__ import annotations

from undertow.tasks.base import SPLITS, Example, Generated, Record, Tags, Task
from undertow.tasks.fineweb import FineWeb
from undertow.tasks.gsm8k import GSM8K
from undertow.tasks.hotpotqa import HotpotQA
from undertow.tasks.pathfinding import Pathfinding
from undertow.tasks.prosqa import ProsQA
from undertow.tasks.reasoning_gym import ReasoningGym
from undertow.tasks.s5 import S5
from undertow.tasks.text import Stdlib, TextFiles
from undertow.tasks.tokenised import Tokenised
from undertow.tasks.topics import Topics
from undertow.tasks.variables import VariableAssignment

_ALL: tuple[type[Task], ...] = (
    S5,
    VariableAssignment,
    Pathfinding,
    ProsQA,
    GSM8K,
    HotpotQA,
    ReasoningGym,
    FineWeb,
    Topics,
    TextFiles,
    Tokenised,
    Stdlib,
)
TASKS: dict[str, type[Task]] = {task.__name__: task for task in _ALL}  # by class name

__all__ = ["SPLITS", "TASKS", "Example", "Generated", "Record", "Tags", "Task"]
