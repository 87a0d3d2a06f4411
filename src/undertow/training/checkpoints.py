"""Checkpoints that can be trusted: a torn one (killed while writing, disk full) is never resumed from."""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

NAME = re.compile(r"checkpoint-(\d+)")


def problem(folder: Path) -> str | None:
    """Why this checkpoint cannot be resumed from, in a few words; None if it is complete.

    Weights must have the length their header says, zipped states their directory at the end; `trainer_state.json`
    is written last.
    """
    weights = sorted(folder.glob("*.safetensors"))
    states = [folder / "optimizer.pt", folder / "scheduler.pt", *sorted(folder.glob("rng_state*.pth"))]
    if not weights or len(states) < 3:
        return "weights or states are missing"
    if (torn := torn_tensors(weights)) is not None:
        return torn
    for path in states:
        if not path.is_file() or not zipfile.is_zipfile(path):
            return f"{path.name} is missing or torn"
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "trainer_state.json is missing or torn"
    return None if state["global_step"] == step_of(folder) else "trainer_state.json is of another step"


def torn_tensors(paths: Iterable[Path]) -> str | None:
    """Which of these safetensors files lacks part of what its header says, in a few words; None: none."""
    for path in paths:
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError):
            return f"{path.name} is {'torn' if path.exists() else 'missing'}"
    return None


def step_of(folder: Path) -> int:
    """The optimiser steps done when this checkpoint was written."""
    return int(folder.name.removeprefix("checkpoint-"))


def newest_complete(root: Path, problem: Callable[[Path], str | None] = problem) -> Path | None:
    """The newest checkpoint below `root` that has no `problem`; warns about every torn one it skips."""
    found = [path for path in root.glob("checkpoint-*") if NAME.fullmatch(path.name)] if root.is_dir() else []
    for path in sorted(found, key=step_of, reverse=True):
        why = problem(path)
        if why is None:
            return path
        warnings.warn(f"skipping checkpoint {path}: {why}", stacklevel=2)
    return None


def disk_full(error: BaseException, folder: Path) -> OSError | None:
    """An error while saving as one clear OSError if the disk was full, else None; what was half written is removed.

    safetensors and torch say "No space left" in exceptions of their own.
    """
    words = str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in words or "os error 28" in words
    if not full and not ("PytorchStreamWriter" in words and shutil.disk_usage(folder.parent).free < 1 << 20):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return OSError(errno.ENOSPC, "disk full while saving a checkpoint; older checkpoints are whole", str(folder))
