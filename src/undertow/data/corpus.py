"""Text: documents read from the running Python's standard library or from local files, split by file.

A document is one file. Whether it belongs to training or validation depends on the hash of its name, so adding or
removing other files moves nothing across the border (but of so few files that the hash picks none, one is held out).
Equal contents count once: no text is in both splits.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import logging
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from undertow.data import cache

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
class Corpus:
    """Documents of the two splits, in a fixed order; no file and no text is in both."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]

    @cached_property
    def train_bytes(self) -> int:
        """Bytes of the training text in UTF-8."""
        return sum(len(document.text.encode()) for document in self.train)

    @cached_property
    def validation_bytes(self) -> int:
        """Bytes of the validation text in UTF-8."""
        return sum(len(document.text.encode()) for document in self.validation)


def load_corpus(source: str | Sequence[str] = STDLIB, validation: str | Sequence[str] | None = None) -> Corpus:
    """Read the documents and split them by file.

    Args:
        source: `"stdlib"` (the standard library's sources and the documentation text that `help()` shows, 12 MB), a
            text file, a folder (all its text files, hidden ones left out) or a glob (`**` crosses folders); or
            several of these. `"topics"` is that documentation alone, 0.5 MB of prose. A folder that is itself called
            stdlib or topics is written `./stdlib`.
        validation: what to validate on, named the same way. None: about 5 % of the source's files, chosen by the hash
            of their names (of two or more files always at least one). If given, it is kept whole and texts that
            occur in it are left out of training.

    Returns:
        The documents that are not blank, texts that occur twice kept once (the first).

    Raises:
        ValueError: nothing found under a name, a named file is not UTF-8 text, or a split is empty. One line.
    """
    found = _read_all(source, "source")
    if validation is None:
        found = _distinct(found, set())
        held_out = _held_out(found)
        train = [document for document in found if document.name not in held_out]
        held = [document for document in found if document.name in held_out]
    else:
        seen: set[bytes] = set()
        held = _distinct(_read_all(validation, "validation"), seen)
        train = _distinct(found, seen)
    if not train:
        raise ValueError(f"source: {source!r}: no text is left to train on; give more files than validation holds")
    if not held:
        raise ValueError(f"source: {source!r}: a single text cannot be split by file; give more files or `validation`")
    return Corpus(tuple(train), tuple(held))


def load_documents(source: str | Sequence[str]) -> list[Document]:
    """The documents that are not blank, each text once, of a `source` as of `load_corpus`. Raises ValueError."""
    return _distinct(_read_all(source, "text"), set())


def corpus_hash(documents: Sequence[Document]) -> str:
    """A hexadecimal SHA-256 of the texts in their order."""
    return cache.digest(document.text for document in documents)


def _held_out(documents: Sequence[Document]) -> set[str]:
    """Names of the validation documents."""
    rank = {document.name: _rank(document.name) for document in documents}
    chosen = {name for name in rank if rank[name] < VALIDATION_SHARE}
    if not chosen and len(rank) > 1:
        chosen = {min(rank, key=rank.__getitem__)}
    return chosen


def _rank(name: str) -> float:
    """A fixed number in [0, 1) for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _distinct(documents: Sequence[Document], seen: set[bytes]) -> list[Document]:
    """The documents whose text is not yet in `seen` (updated), in their order."""
    kept = []
    for document in documents:
        content = hashlib.sha256(document.text.encode()).digest()
        if content not in seen:
            seen.add(content)
            kept.append(document)
    if len(kept) < len(documents):
        logger.info("%d documents left out: the same text occurs before", len(documents) - len(kept))
    return kept


def _read_all(source: str | Sequence[str], argument: str) -> list[Document]:
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise ValueError(f"{argument}: {source!r}: names nothing; allowed: {_ALLOWED}")
    documents: list[Document] = []
    for name in names:
        found = [document for document in _read(str(name), argument) if document.text.strip()]
        if not found:
            raise ValueError(f"{argument}: {name!r}: holds no text in UTF-8; allowed: {_ALLOWED}")
        documents += found
    return documents


def _read(name: str, argument: str) -> list[Document]:
    """Documents under one name of the user's, sorted by document name."""
    if name == STDLIB:
        return sorted([*_stdlib(), *_topics()], key=lambda document: document.name)
    if name == TOPICS:
        return sorted(_topics(), key=lambda document: document.name)
    path = Path(name).expanduser()
    if path.is_file():
        text = _text(path)
        if text is None:
            raise ValueError(f"{argument}: {name!r}: not text in UTF-8; allowed: {_ALLOWED}")
        return [Document(f"{path.absolute().parent.name}/{path.name}", text)]
    if path.is_dir():
        return _read_files(_walk(path), path)
    if glob.has_magic(str(path)):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        return _read_files([Path(match) for match in glob.glob(str(path), recursive=True)], root)
    raise ValueError(f"{argument}: {name!r}: no such file or folder; allowed: {_ALLOWED}")


def _read_files(files: Sequence[Path], root: Path, label: str | None = None) -> list[Document]:
    """The files that are text, named relative to `root` below `label` (default: the folder's own name)."""
    label = root.resolve().name if label is None else label
    documents = []
    for file in filter(Path.is_file, files):  # a glob finds folders too, a walk broken links
        text = _text(file)
        if text is None:
            logger.info("%s left out: not text in UTF-8", file)
        else:
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


def _text(path: Path) -> str | None:
    """The file's text, line ends as they are; None if it is not UTF-8 (or is binary data that happens to be)."""
    data = path.read_bytes()
    try:
        return None if b"\0" in data else data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, _LEFT_OUT)
    # Build settings (_sysconfigdata*.py, config-*/) hold the paths of one machine.
    portable = [file for file in files if not file.relative_to(root).parts[0].startswith(("_sysconfigdata", "config-"))]
    yield from _read_files([file for file in portable if file.suffix == ".py"], root, STDLIB)


def _topics() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        logger.info("pydoc_data is not installed: the corpus has no documentation text")
        return
    yield from (Document(f"topics/{name}", text) for name, text in topics.items())
