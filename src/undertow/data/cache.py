"""What is kept on disk between runs: where it lies, and how a file appears there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO


def folder(given: str | Path | None = None) -> Path:
    """The cache folder: the given one, else `$UNDERTOW_CACHE`, else `undertow` in the user's cache folder."""
    if given is not None:
        return Path(given).expanduser()
    if "UNDERTOW_CACHE" in os.environ:
        return Path(os.environ["UNDERTOW_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "undertow"


def write(path: Path, writer: Callable[[BinaryIO], object]) -> None:
    """Let `writer` fill a file that takes its name only when complete.

    Processes that write the same path at once each rename a file of their own; the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves the name without the bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def digest(parts: Iterable[str | int]) -> str:
    """A hexadecimal SHA-256 of the parts; where one part ends and the next begins counts too."""
    total = hashlib.sha256()
    for part in parts:
        data = str(part).encode()
        total.update(b"%d:" % len(data))
        total.update(data)
    return total.hexdigest()
