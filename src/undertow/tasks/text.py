"""Plain text: files of one's own, and the text that every Python brings along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from undertow.tasks.base import SPLITS, Kind, Record, Task

if TYPE_CHECKING:
    from undertow.data.corpus import Corpus, Reading


class _Documents(Task):
    """Documents split by file, as `undertow.data.load_corpus` does it; test is what the files' names say is."""

    kind: ClassVar[Kind] = "text"

    @cached_property
    def corpus(self) -> Corpus:
        """The documents, read when first asked for."""
        raise NotImplementedError

    def records(self, split: str) -> Iterator[Record]:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")
        held = {"train": self.corpus.train, "validation": self.corpus.validation, "test": self.corpus.test}[split]
        return ({"name": document.name, "text": document.text} for document in held)

    def key(self, record: Record) -> str:
        return record["text"]

    def reading(self) -> Reading:
        return self.corpus.reading


@dataclass(frozen=True)
class TextFiles(_Documents):
    """Plain text files, folders of them or globs; a document is a file.

    Args:
        path: what to read; one or several.
        validation: what to validate on, named the same way. None: what the files' names say (`valid.txt`, `dev/`, see
            `undertow.data.splits`), else about 5 % of them by the hash of their names.
    """

    path: str | tuple[str, ...]
    validation: str | tuple[str, ...] | None = None

    @cached_property
    def corpus(self) -> Corpus:
        from undertow.data.corpus import load_corpus

        # A folder that happens to be called so is not the standard library: that is `Stdlib`.
        paths = (self.path,) if isinstance(self.path, str) else self.path
        return load_corpus(["./stdlib" if path == "stdlib" else path for path in paths], self.validation)


@dataclass(frozen=True)
class Stdlib(_Documents):
    """The running Python's standard library: 12 MB, always there."""

    @cached_property
    def corpus(self) -> Corpus:
        from undertow.data.corpus import load_corpus

        return load_corpus("stdlib")
