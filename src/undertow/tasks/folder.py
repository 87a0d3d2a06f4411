"""A task's records in a folder, as `undertow data TASK --out DIR` writes them: task.json and a file a split.

task.json names the task and, for each split that is written, its records, bytes and SHA-256. A split's file takes its
name when it is whole, and task.json lists it after that: what a kill left unfinished is known, and written next time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undertow.tasks import files
from undertow.tasks.base import SPLITS, Example, Record, Tags, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "task.json"
FORMAT = 1
_EVERY = 1000  # records between two words about progress


def write(task: Task, out: str | Path, watch: Callable[[str, int], object] = lambda split, count: None) -> dict:
    """Write a task's three splits into a folder; what it already holds of the same task is checked and kept.

    Args:
        out: a folder that is new, empty, or holds this very task.
        watch: called now and then, and at each split's end, with the split and how many of its records are written.

    Returns:
        What task.json holds.

    Raises:
        ValueError, OSError: the folder holds something else or a damaged file, the task is an endless stream, or what
            the task raises. One line.
    """
    out = Path(out).expanduser()
    if task.streams and task.to_dict().get("limit") is None:
        raise ValueError(f"{type(task).__name__} limit=None: is a stream; give limit=, how many documents to write")
    held = _held(task, out)
    for split in SPLITS:
        path = out / f"{split}.jsonl"
        if split in held["splits"] and path.exists():
            _check(path, held["splits"][split])
            watch(split, held["splits"][split]["records"])
        else:
            held["splits"][split] = _write(task, split, path, watch)
            _save(out, held)
    return held


@dataclass(frozen=True)
class Folder(Task):
    """The records of a folder, as the task that made them.

    Raises (when made): ValueError or OSError, one line: no complete folder of a task there.
    """

    path: str

    def __post_init__(self):
        missing = [split for split in SPLITS if split not in self._held["splits"]]
        if missing:
            raise ValueError(f"{self.path}: lacks {', '.join(missing)}; the same `undertow data` again goes on with it")
        for name in ("kind", "streams"):  # of the class elsewhere; here of the task within
            object.__setattr__(self, name, getattr(self.task, name))

    @cached_property
    def task(self) -> Task:
        """The task that made the records. Raises ValueError: the folder names none that is known."""
        from undertow.tasks.parse import parse

        try:
            return parse(self._held["task"])
        except ValueError as error:
            raise ValueError(f"{Path(self.path) / MANIFEST}: {error}") from None

    def count(self, split: str) -> int:
        """How many records a split has."""
        return self._held["splits"][split]["records"]

    def records(self, split: str) -> Iterator[Record]:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")
        path = Path(self.path).expanduser() / f"{split}.jsonl"
        if split not in self._checked:
            _check(path, self._held["splits"][split])
            self._checked.add(split)
        if self.count(split):
            yield from files.read(path)

    def example(self, record: Record) -> Example | Tags:
        return self.task.example(record)

    def correct(self, record: Record, text: str) -> bool:
        return self.task.correct(record, text)

    def key(self, record: Record) -> Hashable:
        return self.task.key(record)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.task.tokenizer()

    @cached_property
    def _held(self) -> dict:
        return _load(Path(self.path).expanduser() / MANIFEST)

    @cached_property
    def _checked(self) -> set[str]:
        """Splits whose file was found to be the one that was written."""
        return set()


def is_folder(path: str | Path) -> bool:
    """Whether a folder was written by `undertow data`."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def _held(task: Task, out: Path) -> dict:
    """What the folder holds of the task; makes the folder. Raises if it holds anything else."""
    wanted = _plain(task.to_dict())
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; must be a folder")
    if is_folder(out):
        held = _load(out / MANIFEST)
        if held["task"] != wanted:
            raise ValueError(
                f"{out}: holds another task ({_said(held['task'])}), not {_said(wanted)}; name a new folder"
            )
        return held
    if out.is_dir() and any(not path.name.endswith(".tmp") for path in out.iterdir()):
        raise ValueError(f"{out}: is not empty and holds no {MANIFEST}; name a new folder")
    held = {"format": FORMAT, "task": wanted, "splits": {}}
    _save(out, held)
    return held


def _load(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `undertow data TASK --out DIR` makes such a folder")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']!r}; this version reads {FORMAT}")
        for name, split in held["splits"].items():
            if not {"records", "bytes", "sha256"} <= set(split):
                raise ValueError(f"{name} lacks records, bytes or sha256")
        _said(held["task"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not as `undertow data` writes it ({type(error).__name__}: {error})") from None
    return held


def _save(out: Path, held: dict) -> None:
    from undertow.data import cache

    cache.write(out / MANIFEST, lambda file: file.write(json.dumps(held, indent=2).encode() + b"\n"))


def _write(task: Task, split: str, path: Path, watch: Callable[[str, int], object]) -> dict:
    """Write one split; returns its records, bytes and SHA-256."""
    from undertow.data import cache

    count, size, total = 0, 0, hashlib.sha256()

    def lines(file):
        nonlocal count, size
        for count, record in enumerate(task.records(split), start=1):
            try:
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            except (TypeError, ValueError) as error:
                raise ValueError(f"{type(task).__name__} {split}, record {count}: not JSON ({error})") from None
            file.write(line)
            total.update(line)
            size += len(line)
            if count % _EVERY == 0:
                watch(split, count)

    cache.write(path, lines)
    watch(split, count)
    return {"records": count, "bytes": size, "sha256": total.hexdigest()}


def _check(path: Path, said: dict) -> None:
    """Raise unless the file is the one that was written."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the same `undertow data` again writes it")
    size = path.stat().st_size
    if size != said["bytes"]:
        raise ValueError(f"{path}: has {size:,} bytes, {MANIFEST} says {said['bytes']:,}: torn or changed; remove it")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    if found != said["sha256"]:
        raise ValueError(f"{path}: its SHA-256 is not the one in {MANIFEST}: changed since it was written; remove it")


def _sha256(file) -> str:  # Python 3.10
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))  # tuples become lists, as they come back


def _said(task: dict) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in task.items() if name != "task")
    return f"{task['task']}({options})"
