"""The Hugging Face hub: what is a name there and what a path that is not there, and whether the hub answers at all."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 3.0  # to wait for an answer; the clients of the hub try again and again for up to a minute
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = {".bin", ".csv", ".gguf", ".json", ".jsonl", ".model", ".parquet", ".pt", ".pth", ".safetensors", ".txt"}
_FILES |= {".yaml", ".yml", ".gz", ".zip"}


def is_local(name: str | Path) -> bool:
    """Whether a name is that of a file or folder here; else it is an id on the hub.

    Raises:
        ValueError: one line: it can only be a path (it is no `name` or `organisation/name`, ends as a file does, or its
            first folder is here), and there is nothing.
    """
    path = Path(name).expanduser()
    if path.exists():
        return True
    text = str(name)
    first, _, rest = text.partition("/")
    if (
        isinstance(name, Path)
        or not _ID.fullmatch(text)
        or path.suffix.lower() in _FILES
        or rest
        and Path(first).is_dir()
    ):
        nearest = next(parent for parent in path.parents if parent.is_dir() or parent == parent.parent)
        raise ValueError(f"{text}: no such file or folder{_inside(nearest) if nearest != Path('.') else ''}")
    return False


def offline() -> bool:
    """Whether the hub cannot be asked: `HF_HUB_OFFLINE` says so, or its host (or the proxy) does not answer at once."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    url = urlsplit(constants.ENDPOINT)
    proxy = None if urllib.request.proxy_bypass(url.hostname or "") else urllib.request.getproxies().get(url.scheme)
    if proxy is not None:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    answered = threading.Event()

    def ask() -> None:
        port = url.port or (80 if url.scheme == "http" else 443)
        try:
            socket.create_connection((url.hostname or "", port), SECONDS).close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(SECONDS)
    return not answered.is_set()


@contextmanager
def asked_once() -> Iterator[None]:
    """Where the hub does not answer, `datasets` reads its cache alone meanwhile: it would try for half a minute."""
    import datasets
    from huggingface_hub import constants

    places = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    silent = offline()
    try:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value or silent
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _inside(folder: Path) -> str:
    """What a folder holds, to find the name that was meant."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return f"; {folder} holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""
