"""Tasks whose records are read: which split a record belongs to, and nothing of one split in another."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from undertow.tasks import files
from undertow.tasks.base import SPLITS, Record, Task

SHARE = 0.05  # of the training records, for a split that was not published


def drawn(key: Hashable, lacking: Sequence[str], share: float = SHARE) -> str:
    """The split of a training record when `lacking` splits are taken out of training, by the hash of its key.

    Equal keys go to the same split, and adding or removing records moves no other.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    place = int(int.from_bytes(digest[:6], "big") / 2**48 / share)
    return lacking[place] if place < len(lacking) else "train"


class Splits(Task):
    """Records of published splits; one that was not published is taken out of training, by hash.

    Test is kept as it is; validation leaves out what is in test, training what is in either.
    """

    def sources(self) -> Mapping[str, Any]:
        """Where each split comes from (`train` always): what `read` is given. A split that is absent is drawn.

        Raises ValueError, one line, where that cannot be said.
        """
        raise NotImplementedError

    def read(self, source: Any) -> Iterator[Record]:
        """The records of one source, in its order. Raises ValueError or OSError, one line."""
        raise NotImplementedError

    def records(self, split: str) -> Iterator[Record]:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")
        sources = self.sources()
        lacking = [name for name in SPLITS[1:] if name not in sources]
        source = sources.get(split, sources["train"])
        later = [name for name in SPLITS[SPLITS.index(split) + 1 :] if name in sources]
        if split == "validation" and sources.get("test") == source:  # one file for both: meant so
            later = []
        taken = {self._digest(record) for name in later for record in self.read(sources[name])}
        count = 0
        for record in self.read(source):
            published = split != "train" and split in sources
            if self._digest(record) not in taken and (published or drawn(self.key(record), lacking) == split):
                count += 1
                yield record
        if count == 0:
            said = f"its records are all in {' and '.join(later)}" if later else "of so few records none falls to it"
            raise ValueError(f"{type(self).__name__} {split}: {source} gives nothing ({said}); give {split}= a file")

    def _digest(self, record: Record) -> bytes:
        return hashlib.blake2b(repr(self.key(record)).encode(), digest_size=12).digest()


@dataclass(frozen=True)
class Loaded(Splits):
    """Records from local files or from the hub.

    Args:
        path: file of the training records (JSON lines, a JSON array, CSV or parquet). None: the hub's.
        validation, test: files of the other splits. None: the hub's with `path` None; what neither has is taken
            from the training records, 5 % of them by the hash of the question.
    """

    path: str | None = None
    validation: str | None = None
    test: str | None = None

    fields: ClassVar[tuple[str, ...]] = ()  # what every record must have

    def published(self) -> tuple[str, str | None, dict[str, str]]:
        """The data set on the hub: its id, its configuration, and the name there of each split of ours."""
        raise NotImplementedError

    def parsed(self, record: Record) -> Record:
        """A published record as this task keeps it. Raises ValueError that says what is wrong."""
        return record

    def sources(self) -> Mapping[str, Any]:
        local = {"train": self.path, "validation": self.validation, "test": self.test}
        found: dict[str, Any] = {split: path for split, path in local.items() if path is not None}
        if self.path is None:
            name, config, names = self.published()
            found = {split: (name, config, there) for split, there in names.items()} | found
        return found

    def read(self, source: Any) -> Iterator[Record]:
        if isinstance(source, str):
            records, where = files.read(source, self.fields), source
        else:
            name, config, there = source
            records, where = files.hub(name, there, config, self.fields), f"{name} ({there})"
        for number, record in enumerate(records, start=1):
            try:
                yield self.parsed(record)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{where}, record {number}: {error}") from None
