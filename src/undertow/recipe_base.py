"""What every section of a recipe has in common: its errors, one line each, and keys that apply under a condition."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line."""


class Bad(RecipeError):
    """What is wrong with the value at `key`, relative to the section that is being checked."""

    def __init__(self, key: str, text: str):
        super().__init__(text)
        self.key = key


class DoesNotApply(Bad):
    """A key that is set where nothing reads it. `key` is the whole dotted one once a recipe is parsed."""

    def __init__(self, key: str, value, what: str):
        super().__init__(key, f"{value!r}: does not apply to {what}; leave it out")


@dataclasses.dataclass(frozen=True)
class Conditional:
    """A key that is read only where `applies(section)`; elsewhere it "does not apply to" what `otherwise` names.

    `default` is what an unset key stands for where it applies.
    """

    key: str
    default: Any
    applies: Callable[[Any], bool]
    otherwise: str

    def check(self, section) -> None:
        """Raise DoesNotApply where the key is set but nothing reads it."""
        value = getattr(section, self.key)
        if value is not None and not self.applies(section):
            raise DoesNotApply(self.key, value, self.otherwise)


def choices(value, allowed: Sequence[str]) -> str:
    """The nearest match to `value`, if any, and all that is allowed."""
    folded = {name.lower(): name for name in reversed(allowed)}
    close = difflib.get_close_matches(str(value).lower(), list(folded), n=1, cutoff=0.5)
    return (f"did you mean {folded[close[0]]!r}? " if close else "") + f"allowed: {', '.join(allowed)}"


def one_line(error: BaseException) -> str:
    """The message of any exception on one line."""
    return " ".join(str(error).split())


def folder_name(value: str) -> str:
    """The value, if a folder directly below another one can have it as its name. Raises Bad."""
    plain = isinstance(value, str) and value.isprintable() and len(value.encode(errors="replace")) <= 200
    if not plain or not value or value != Path(value).name or value.startswith(".") or "\\" in value:
        raise Bad("", f"{value!r}: must be usable as the name of a folder")
    return value


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not converted, nothing changes after loading.

    `conditional` lists the keys that something reads only under a condition. They are None where nobody set them; one
    that is set where nothing reads it is an error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    conditional: ClassVar[tuple[Conditional, ...]] = ()

    @model_validator(mode="after")
    def _applies(self):
        for condition in self.conditional:
            condition.check(self)
        return self

    def value(self, key: str):
        """What a conditional key says, or its default where nobody set it."""
        held = getattr(self, key)
        return next(c.default for c in self.conditional if c.key == key) if held is None else held
