"""Which texts a run was made of: a hash of each split, so that what is measured later is known to be the same.

A fingerprint is plain values, `{split: {"count", "sha256", "names"}}`, as `data.json` of a run holds it; `names` is
left out where texts have none, or where there are very many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from undertow.data import cache
from undertow.data.corpus import Document
from undertow.tasks.base import Generated, Record, Task

NAMED = 5000  # with more files their names are not kept
SHOWN = 3  # names that a difference tells

Fingerprint = dict[str, dict[str, Any]]


def of_documents(documents: Sequence[Document]) -> dict[str, Any]:
    """Of files: each one's own hash, too, so that a difference can be named."""
    values: dict[str, Any] = {"count": len(documents)}
    values["sha256"] = cache.digest(part for document in documents for part in (document.name, document.text))
    if len(documents) <= NAMED:
        values["names"] = {document.name: cache.digest([document.text])[:16] for document in documents}
    return values


def of_records(contents: Iterable[str]) -> dict[str, Any]:
    """Of a task's records, each as what a model is shown of it."""
    count = 0

    def counted():
        nonlocal count
        for content in contents:
            count += 1
            yield content

    sha256 = cache.digest(counted())
    return {"count": count, "sha256": sha256}


def of_test(task: Task) -> dict[str, Any] | None:
    """Of the test records of a task that reads them (drawn ones follow from its options); None where it has none."""
    if isinstance(task, Generated) or task.kind not in ("answers", "tags"):
        return None
    try:
        return of_records(repr(task.example(record)) for record in task.records("test"))
    except (ValueError, OSError):  # said by whoever wants to measure on it
        return None


def contents(records: Sequence[Record], task: Task) -> Iterable[str]:
    """What a model is shown of each record, as text."""
    if task.kind in ("answers", "tags"):
        return (repr(task.example(record)) for record in records)
    field = "text" if task.kind == "text" else "input_ids"
    return (f"{record.get(field)}{record.get('labels') or ''}" for record in records)


def difference(then: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> str | None:
    """What has changed between two fingerprints, in a few words; None: nothing."""
    changes = []
    for split in dict.fromkeys([*then, *now]):
        a, b = then.get(split), now.get(split)
        if a is None or b is None:
            changes.append(f"{split} ({'was not' if a is None else 'is not'} there)")
        elif a["sha256"] != b["sha256"]:
            changes.append(f"{split} ({_named(a, b)})")
    return "; ".join(changes) or None


def _named(then: Mapping, now: Mapping) -> str:
    a, b = then.get("names"), now.get("names")
    counts = f"{then['count']:,} texts then, {now['count']:,} now"
    if a is None or b is None:
        return counts if then["count"] != now["count"] else f"{counts}, other contents or another order"
    added, gone = [name for name in b if name not in a], [name for name in a if name not in b]
    other = [name for name in a if name in b and a[name] != b[name]]
    said = [f"{word}: {_few(names)}" for word, names in (("new", added), ("gone", gone), ("changed", other)) if names]
    return "; ".join(said) or f"{counts}, in another order"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
