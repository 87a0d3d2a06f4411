"""Folders that can be trusted: written whole or not at all, and gone on from only if every byte is what was written.

A checkpoint is written below `part/`, which a kill leaves behind and the next save removes. When all of it is on the
disk, with the SHA-256 of every file in `checksums.json`, it takes its name by one rename. The trained model likewise.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

NAME = re.compile(r"checkpoint-(\d+)")
PART, CHECKSUMS, STEP = "part", "checksums.json", "step.json"
BLOCK = 1 << 22  # bytes read at once
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, beyond `ulimit -f`
# safetensors, torch and numpy say it in words of their own.
WORDS = (
    "No space left",
    "os error 28",
    "os error 27",
    "os error 122",
    "PytorchStreamWriter",
    "unexpected pos",
    "requested and",
)


def begin(target: Path) -> Path:
    """An empty folder for what will be `target`; what an earlier one left unfinished beside it is removed."""
    abandon(target)
    part = target.parent / PART / target.name
    part.mkdir(parents=True)
    return part


def abandon(target: Path) -> None:
    """Remove what was begun for `target`, if anything."""
    shutil.rmtree(target.parent / PART, ignore_errors=True)


def finish(target: Path) -> None:
    """What was begun for `target` takes its name, with checksums, once the disk holds all of it."""
    part = target.parent / PART / target.name
    files = sorted(path for path in part.rglob("*") if path.is_file())
    said = {path.relative_to(part).as_posix(): _sha256(path) for path in files}
    (part / CHECKSUMS).write_text(json.dumps(said, indent=1), encoding="utf-8")
    for path in (*files, part / CHECKSUMS, *(path for path in part.rglob("*") if path.is_dir()), part):
        sync(path)
    if target.exists():  # found damaged when the run went on, else it would not be written again
        shutil.rmtree(target)
    part.rename(target)
    part.parent.rmdir()
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder (which Windows opens for nobody)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def problem(folder: Path, pattern: str = "*") -> str | None:
    """Why the folder cannot be trusted, in a few words; None if all its files are what was written.

    Args:
        pattern: only files whose name matches are looked at.
    """
    try:
        said = {
            str(name): str(value)
            for name, value in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, AttributeError):
        return f"{CHECKSUMS} is missing or torn"
    for name in said:
        if not fnmatch(name, pattern):
            continue
        try:
            found = _sha256(folder / name)
        except (OSError, ValueError):
            return f"{name} is missing"
        if found != said[name]:
            return f"{name} is torn or changed"
    return None


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def step_of(folder: Path) -> int:
    """The optimiser steps done when this checkpoint was written."""
    return int(folder.name.removeprefix("checkpoint-"))


def below(root: Path) -> list[Path]:
    """All checkpoints below `root`, oldest first, whole or not."""
    found = [path for path in root.glob("checkpoint-*") if NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=step_of)


def newest_complete(root: Path) -> Path | None:
    """The newest whole checkpoint below `root`; warns about every damaged one it skips."""
    for path in reversed(below(root)):
        why = problem(path)
        if why is None:
            return path
        warnings.warn(f"skipping checkpoint {path}: {why}", stacklevel=2)
    return None


def rows_of_step(root: Path) -> int | None:
    """How many rows a step of the run had, all processes together; None where no checkpoint says it."""
    for path in reversed(below(root)):
        with suppress(OSError, ValueError, LookupError, TypeError):  # damaged: `newest_complete` says so
            return int(json.loads((path / STEP).read_text(encoding="utf-8"))["rows"])
    return None


def rotate(root: Path, newest: int, keep: int) -> None:
    """Keep the `keep` checkpoints up to step `newest`, which was just written; later ones were found damaged."""
    kept = [path for path in below(root) if step_of(path) <= newest][-keep:]
    for path in below(root):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def full_disk_said(root: Path) -> Iterator[None]:
    """Errors of a full disk, in whatever words, as one clear OSError that names the newest checkpoint below `root`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) not in FULL and not any(word in str(error) for word in WORDS):
            raise
        last = newest_complete(root)
        said = f"disk full; the last whole checkpoint is {last or 'none'}; make room, then --resume"
        raise OSError(errno.ENOSPC, said) from error


def check_size(place: Path) -> None:
    """Raise ValueError where config.json is of a far larger model than the weights, which would be built first."""
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place)).num_parameters()
    held = 0
    for path in place.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    if described > 2 * held + 1_000_000:
        raise ValueError(f"config.json is of a model of {described:,} parameters, the weights hold {held:,}")
