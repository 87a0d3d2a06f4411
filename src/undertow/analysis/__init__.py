"""What a model is and whether it does what it says: checks, costs, pictures, comparisons.

Here is what they share: verdicts, the name of a schedule, and how a recipe or a run becomes a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "cyan")}


@dataclass(frozen=True)
class Check:
    """One verdict. `ok` is None where something was measured that can be good or bad, but not broken."""

    name: str
    ok: bool | None
    line: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All verdicts on one model; prints as one line each, with rich or without. `report["causal"]` is one of them."""

    name: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(check.ok is not False for check in self.checks)

    @property
    def verdict(self) -> str:
        """The last line: which checks failed, or that none did."""
        broken = [check.name for check in self.checks if check.ok is False]
        return f"BROKEN: {', '.join(broken)}" if broken else "nothing is broken"

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{MARKS[check.ok][0]} {check.name:<{width}}  {check.line}" for check in self.checks]
        return "\n".join([self.name, *lines, self.verdict])

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        for check in self.checks:
            mark, style = MARKS[check.ok]
            rows.add_row(Text(f"{mark} {check.name}", style), Text(check.line))
        return Group(Text(self.name, "bold"), rows, Text(self.verdict, MARKS[self.ok][1]))


def label(schedule) -> str:
    """A schedule as one types it, without fields that say nothing: `Cyclic(G=8, n=3, adjoint=4)`."""
    said = []
    for f in fields(schedule):
        value = getattr(schedule, f.name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole or value not in (f.default, {}):
            said.append(f"{f.name}={value!r}")
    return f"{type(schedule).__name__}({', '.join(said)})"


def open_target(target, overrides: Sequence[str] = (), device: str = "auto", rows: int = 0, accept: bool = False):
    """A model to analyse, and text to do it on.

    Args:
        target: a model; a recipe or its file (the model is built with the weights it would start from); the folder of
            a run, or of a saved model.
        overrides: `section.key=value` texts; of a run, only the schedule and the data may change.
        rows: of a run, so many validation rows are read (0: none, the data is not opened).
        accept: take them where the run's texts have changed, with a warning.

    Returns:
        `(name, model, batch or None)`, the batch as `undertow.data.collate` makes it.

    Raises:
        ValueError: a recipe that cannot be loaded, or a saved model that is not recurrent.
        FileNotFoundError: no such file.
    """
    from undertow.model import UndertowForCausalLM

    if isinstance(target, UndertowForCausalLM):
        return target.config.get_text_config().model_type, target, None
    from undertow import recipe as recipes
    from undertow.data import collate
    from undertow.training import run as runs
    from undertow.training.precision import device_of

    if isinstance(target, recipes.Recipe) or not Path(target).is_dir():
        chosen = target if isinstance(target, recipes.Recipe) else recipes.load(target, overrides)
        return chosen.name, runs.build_model(chosen).to(device_of(device)), None
    for text in overrides:
        if not text.startswith(("schedule", "data.")):
            raise ValueError(f"--set {text}: only schedule and data.* may change for a trained model")
    loaded, batch = runs.load(target, device), None
    if not isinstance(loaded.model, UndertowForCausalLM):
        raise ValueError(f"{target}: holds a {type(loaded.model).__name__}; make it recurrent with undertow.wrap first")
    if loaded.recipe is not None:
        chosen = recipes.load(target, overrides)
        loaded.model.schedule = chosen.schedule or loaded.model.schedule
        if rows:
            changed = any(text.startswith("data.") for text in overrides)
            validation = runs.reopen(Path(target), chosen, accept, changed=changed).validation
            batch = collate([validation[i] for i in range(min(rows, len(validation)))])
    return Path(target).resolve().name, loaded.model, batch
