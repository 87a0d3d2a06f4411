"""Names of texts that may be paths: whether something lies there, and where that is whatever the working folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from undertow.data.corpus import STDLIB, TOPICS


def exists(name: str) -> bool:
    """Whether there is anything under a name of `load_corpus`."""
    path = Path(name).expanduser()
    if name in (STDLIB, TOPICS) or path.exists():
        return True
    return glob.has_magic(name) and any(True for _ in glob.iglob(str(path), recursive=True))


def absolute(value):
    """A path, or several, absolute where something lies there; anything else (a hub id, `stdlib`) as it is."""
    if not isinstance(value, str):
        return type(value)(map(absolute, value))
    if value in (STDLIB, TOPICS) or not exists(value):
        return value
    return os.path.abspath(Path(value).expanduser())
