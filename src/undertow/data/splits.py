"""Which split a file is of by its name: `wiki.valid.tokens`, `data/train/000.txt`, `TinyStoriesV2-GPT4-train.txt`.

A name says a split where its last word does, in any case. Words stand between `.`, `-`, `_` and spaces; the suffix,
numbers and the words of `_PLAIN` are not counted (`train_data.txt`, `valid-00000-of-00041`). So `contest`,
`training_notes` and `test_utils` say none. The file's own name comes first, then its folders from the innermost out;
a folder that all files share says nothing, nor do names that say the same of every file.

What a page or a piece of source code is called is its subject (`training.md`, `test.py`): only its folders count, and
where most files of a source are code only if each of them lies in a folder that says a split (so `requirements/dev.txt`
of a program is no validation text). Folders called `dev`, `eval` or `test` count where some other name says train or
validation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

Named = Literal["train", "validation", "test"]

WORDS: dict[str, Named] = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval", "evaluation", "heldout", "holdout"), "validation"),
    "test": "test",
    "testing": "test",
}
_EVERYDAY = {"dev", "eval", "evaluation", "test", "testing", "training"}  # as names of folders
_PLAIN = {
    *("data", "dataset", "set", "split", "text", "texts", "corpus", "raw", "tokens", "part", "shard", "of", "full"),
    *("small", "large", "mini", "clean", "processed", "tokenized", "tokenised", "shuffled", "monolingual"),
}
_ABOUT = {"readme", "license", "licence", "copying", "notice", "citation", "authors", "changelog"}
_PAGES = {".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".htm", ".html"}
_CODE = {
    *(".asm", ".bash", ".c", ".cc", ".cfg", ".clj", ".cmake", ".cpp", ".cs", ".css", ".cu", ".cxx", ".dart", ".el"),
    *(".erl", ".ex", ".f90", ".fs", ".go", ".gradle", ".h", ".hh", ".hpp", ".hs", ".ini", ".ipynb", ".java", ".jl"),
    *(".js", ".jsx", ".kt", ".lisp", ".lua", ".m", ".mjs", ".mk", ".ml", ".mm", ".php", ".pl", ".proto", ".ps1", ".py"),
    *(".pyi", ".pyx", ".r", ".rb", ".rs", ".s", ".scala", ".scss", ".sh", ".sql", ".swift", ".toml", ".ts", ".tsx"),
    *(".v", ".vhd", ".vim", ".vue", ".yaml", ".yml", ".zig"),
}


def by_name(names: Sequence[str]) -> list[Named | None] | None:
    """The split that each file's name says, None for a file that says none; None altogether where names say nothing.

    Args:
        names: posix paths; the first part names the source (`corpus.Document`).
    """
    paths = [PurePosixPath(name) for name in names]
    shared = len(os.path.commonprefix([path.parts[:-1] for path in paths]))
    folders = [path.parts[shared:-1] for path in paths]
    programs = _programs(paths, folders)
    own = [None if path.suffix.lower() in _CODE | _PAGES else _of_words(_words(path.name)) for path in paths]
    plain = {
        split or _of_folders(inner, everyday=False)
        for path, split, inner in zip(paths, own, folders, strict=True)
        if path.parts[0] not in programs
    }
    everyday = bool(plain & {"train", "validation"})
    said = []
    for path, split, inner in zip(paths, own, folders, strict=True):
        if path.parts[0] in programs:
            said.append(_of_folders(inner, everyday=True) if programs[path.parts[0]] else None)
        else:
            said.append(split or _of_folders(inner, everyday))
    return said if len(set(said)) > 1 else None


def _programs(paths: Sequence[PurePosixPath], folders: Sequence[tuple[str, ...]]) -> dict[str, bool]:
    """The sources most of whose files are code, and whether each of their files lies in a folder that says a split."""
    found = {}
    for source in {path.parts[0] for path in paths}:
        inside = [(path, inner) for path, inner in zip(paths, folders, strict=True) if path.parts[0] == source]
        if 2 * sum(path.suffix.lower() in _CODE for path, _ in inside) > len(inside):
            found[source] = all(about(path.name) or _of_folders(inner, everyday=True) for path, inner in inside)
    return found


def about(name: str) -> bool:
    """Whether a file is about the data (a read-me, a licence) and not of it."""
    return re.split(r"[.\-_ ]", PurePosixPath(name).name.lower())[0] in _ABOUT


def _of_folders(folders: Sequence[str], everyday: bool) -> Named | None:
    """What the innermost folder that says a split says; `everyday`: those of ordinary words count, too."""
    for folder in reversed(folders):
        words = _split(folder)
        split = _of_words(words)
        if split is not None and (everyday or not _EVERYDAY & set(words)):
            return split
    return None


def _of_words(words: list[str]) -> Named | None:
    while words and (words[-1].isdigit() or words[-1] in _PLAIN):
        words = words[:-1]
    if words[-2:] in (["held", "out"], ["hold", "out"]):
        return "validation"
    return WORDS.get(words[-1].rstrip("0123456789")) if words else None


def _words(name: str) -> list[str]:
    """The words of a file's name, without its suffix unless that is a split itself (`wiki.train`)."""
    stem, suffix = os.path.splitext(name)
    words = _split(suffix)
    return _split(stem) + (words if _of_words(words) else [])


def _split(name: str) -> list[str]:
    return [word for word in re.split(r"[.\-_ ]+", name.lower()) if word]
