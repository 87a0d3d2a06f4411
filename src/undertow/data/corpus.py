"""Text: documents read from the running Python's standard library or from local files, split by file.

A document is one file. Where the files bring their own split it is theirs (`splits` says by which names). Else whether
a file belongs to training or validation depends on the hash of its name, so adding or removing other files moves
nothing across the border (but of so few files that the hash picks none, one is held out). Equal contents count once:
no text is in two splits.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import logging
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from undertow.data import cache, encodings, splits

logger = logging.getLogger(__name__)

STDLIB, TOPICS = "stdlib", "topics"
VALIDATION_SHARE = 0.05

# Tests repeat each other; what an installation adds differs from machine to machine; pydoc_data is read as plain text.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__", "pydoc_data"}
_ALLOWED = f"{STDLIB!r}, text files, folders, globs, {TOPICS!r}"


@dataclass(frozen=True)
class Document:
    """One file's text. `name` is its posix path from the folder it was found under, that folder's own name first."""

    name: str
    text: str


@dataclass(frozen=True)
class Reading:
    """What was read, and how it was split: for a line that is printed, and for `result.json`.

    Attributes:
        rule: `names`: the split that the files' names say; `hash`: by the hash of the names; `given`: validation was
            named by the user.
        train_files, train_bytes, validation_files, validation_bytes: of the splits, the bytes of the text in UTF-8.
        test_files: files that say test: in neither split.
        aside: files left out because another split is named: read-mes and licences beside it, and those that say
            validation where the user named another one.
        encodings: files that are not UTF-8, by the encoding they were read in.
        no_text: files that hold no text and were left out.
    """

    rule: Literal["names", "hash", "given"]
    train_files: int
    train_bytes: int
    validation_files: int
    validation_bytes: int
    test_files: int = 0
    aside: int = 0
    encodings: Mapping[str, int] = field(default_factory=dict)
    no_text: int = 0

    def __str__(self) -> str:
        how = {"names": "the files' names", "hash": "the hash of the files' names", "given": "data.validation"}
        sizes = [(self.train_bytes, self.train_files), (self.validation_bytes, self.validation_files)]
        train, validation = (f"{size:,} bytes of {count:,} file{'s' * (count != 1)}" for size, count in sizes)
        out = [(self.test_files, "of a test split"), (self.aside, "beside the split"), (self.no_text, "without text")]
        left = ", ".join(f"{count} {what}" for count, what in out if count)
        return (
            f"training on {train}, validating on {validation}, split by {how[self.rule]}"
            f"{f'; left out: {left}' if left else ''}"
        )

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Corpus:
    """Documents of the splits, in a fixed order; no file and no text is in two of them.

    `test` holds what the files' names say is for testing: it is neither trained nor validated on.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    reading: Reading

    @property
    def train_bytes(self) -> int:
        """Bytes of the training text in UTF-8."""
        return self.reading.train_bytes

    @property
    def validation_bytes(self) -> int:
        """Bytes of the validation text in UTF-8."""
        return self.reading.validation_bytes


def load_corpus(source: str | Sequence[str] = STDLIB, validation: str | Sequence[str] | None = None) -> Corpus:
    """Read the documents and split them by file.

    Args:
        source: `"stdlib"` (the standard library's sources and the documentation text that `help()` shows, 12 MB), a
            text file, a folder (all its text files, hidden ones left out) or a glob (`**` crosses folders); or
            several of these. `"topics"` is that documentation alone, 0.5 MB of prose. A folder that is itself called
            stdlib or topics is written `./stdlib`.
        validation: what to validate on, named the same way. It is kept whole; texts that occur in it, and files whose
            names say validation or test, are left out of training. None: the files whose names say so, see `splits`;
            if none do, about 5 % of the files by the hash of their names (of two or more files always at least one).

    Returns:
        The documents that are not blank, texts that occur twice kept once (the first). Where names say which file is
        for what, a file that says nothing is trained on (a read-me or licence is left out); of a training split
        without one for validation, the hash holds files out.

    Raises:
        ValueError: nothing found under a name, a named file is no text, or a split is empty. One line.
    """
    notes = _Notes()
    found = _read_all(source, "source", notes)
    given = None if validation is None else _read_all(validation, "validation", notes)
    notes.warn()
    said = splits.by_name([document.name for document in found])
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "test": [], "aside": []}
    for document, split in zip(found, said or ["train"] * len(found), strict=True):
        beside = split is None and splits.about(document.name)
        parts["aside" if beside else split or "train"].append(document)
    seen: set[bytes] = set()
    if given is not None:
        parts["aside"] += parts["validation"]
    held = _distinct(parts["validation"] if given is None else given, seen)
    test = _distinct(parts["test"], set())
    train = _distinct(parts["train"], seen | {_content(document) for document in test})
    if not held:
        named = {document.name for document, split in zip(found, said or (), strict=False) if split == "train"}
        alone = named if len(named) == 1 else set()  # what says train is not validated on unless there is more of it
        held_out = _held_out([document for document in train if document.name not in alone], least=len(train) > 1)
        held = [document for document in train if document.name in held_out]
        train = [document for document in train if document.name not in held_out]
    if not train:
        raise ValueError(f"source: {source!r}: no text is left to train on; give more files than validation holds")
    if not held:
        raise ValueError(f"source: {source!r}: a single text cannot be split by file; give more files or `validation`")
    reading = Reading(
        "given" if given is not None else "names" if parts["validation"] else "hash",
        len(train),
        _size(train),
        len(held),
        _size(held),
        len(test),
        len(parts["aside"]),
        dict(notes.encodings),
        len(notes.no_text),
    )
    logger.info("%s", reading)
    return Corpus(tuple(train), tuple(held), tuple(test), reading)


def load_documents(source: str | Sequence[str]) -> list[Document]:
    """The documents that are not blank, each text once, of a `source` as of `load_corpus`. Raises ValueError."""
    notes = _Notes()
    found = _read_all(source, "text", notes)
    notes.warn()
    return _distinct(found, set())


def corpus_hash(documents: Sequence[Document]) -> str:
    """A hexadecimal SHA-256 of the texts in their order."""
    return cache.digest(document.text for document in documents)


def _held_out(documents: Sequence[Document], least: bool) -> set[str]:
    """Names of the validation documents by the hash; `least`: one at least."""
    rank = {document.name: _rank(document.name) for document in documents}
    chosen = {name for name in rank if rank[name] < VALIDATION_SHARE}
    if not chosen and rank and least:
        chosen = {min(rank, key=rank.__getitem__)}
    return chosen


def _rank(name: str) -> float:
    """A fixed number in [0, 1) for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _distinct(documents: Sequence[Document], seen: set[bytes]) -> list[Document]:
    """The documents whose text is not yet in `seen` (updated), in their order."""
    kept = []
    for document in documents:
        content = _content(document)
        if content not in seen:
            seen.add(content)
            kept.append(document)
    if len(kept) < len(documents):
        logger.info("%d documents left out: the same text occurs before", len(documents) - len(kept))
    return kept


def _content(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode()).digest()


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


class _Notes:
    """What is to be said of the files that were read: which were not UTF-8, which held no text."""

    def __init__(self) -> None:
        self.files = 0
        self.encodings: Counter[str] = Counter()
        self.no_text: list[Path] = []
        self._first: dict[str, Path] = {}  # of each encoding

    def text(self, path: Path) -> str | None:
        """The file's text, line ends as they are; None if it is not text."""
        self.files += 1
        found = encodings.text_of(path.read_bytes())
        if found is None:
            self.no_text.append(path)
            return None
        text, encoding = found
        if encoding != encodings.UTF8:
            self.encodings[encoding] += 1
            self._first.setdefault(encoding, path)
        return text

    def warn(self) -> None:
        """One warning, if there is anything to say."""
        said = [f"{n} read as {encoding} (e.g. {self._first[encoding]})" for encoding, n in self.encodings.items()]
        if self.no_text:
            said.append(f"{len(self.no_text)} left out, as no text (e.g. {self.no_text[0]})")
        if said:
            count = self.encodings.total() + len(self.no_text)
            warnings.warn(f"{count} of {self.files} files are not text in UTF-8: {', '.join(said)}", stacklevel=3)


def _read_all(source: str | Sequence[str], argument: str, notes: _Notes) -> list[Document]:
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise ValueError(f"{argument}: {source!r}: names nothing; allowed: {_ALLOWED}")
    documents: list[Document] = []
    for name in names:
        found = [document for document in _read(str(name), argument, notes) if document.text.strip()]
        if not found:
            raise ValueError(f"{argument}: {name!r}: holds no text in UTF-8; allowed: {_ALLOWED}")
        documents += found
    return documents


def _read(name: str, argument: str, notes: _Notes) -> list[Document]:
    """Documents under one name of the user's, sorted by document name."""
    if name == STDLIB:
        return sorted([*_stdlib(), *_topics()], key=lambda document: document.name)
    if name == TOPICS:
        return sorted(_topics(), key=lambda document: document.name)
    path = Path(name).expanduser()
    if path.is_file():
        text = notes.text(path)
        if text is None:
            raise ValueError(f"{argument}: {name!r}: not text in {encodings.ALLOWED}; allowed: {_ALLOWED}")
        return [Document(f"{path.absolute().parent.name}/{path.name}", text)]
    if path.is_dir():
        return _read_files(_walk(path), path, notes)
    if glob.has_magic(str(path)):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        return _read_files([Path(match) for match in glob.glob(str(path), recursive=True)], root, notes)
    raise ValueError(f"{argument}: {name!r}: no such file or folder; allowed: {_ALLOWED}")


def _read_files(files: Sequence[Path], root: Path, notes: _Notes, label: str | None = None) -> list[Document]:
    """The files that are text, named relative to `root` below `label` (default: the folder's own name)."""
    label = root.resolve().name if label is None else label
    documents = []
    for file in sorted(filter(Path.is_file, files)):  # a glob finds folders too, a walk broken links
        text = notes.text(file)
        if text is not None:
            documents.append(Document(f"{label}/{file.relative_to(root).as_posix()}", text))
    return sorted(documents, key=lambda document: document.name)


def _walk(root: Path, left_out: Collection[str] = ("__pycache__",)) -> list[Path]:
    """The files below `root` that are not hidden, nor in a hidden folder or one named in `left_out`."""
    files = []
    for folder, folders, names in os.walk(root):
        # In place: os.walk then does not enter the folders that are gone.
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return files


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, _LEFT_OUT)
    # Build settings (_sysconfigdata*.py, config-*/) hold the paths of one machine.
    portable = [file for file in files if not file.relative_to(root).parts[0].startswith(("_sysconfigdata", "config-"))]
    sources = [file for file in portable if file.suffix == ".py"]
    yield from _read_files(sources, root, _Notes(), STDLIB)  # UTF-8, all of them


def _topics() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        logger.info("pydoc_data is not installed: the corpus has no documentation text")
        return
    yield from (Document(f"topics/{name}", text) for name, text in topics.items())
