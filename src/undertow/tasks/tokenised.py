"""Documents that were tokenised before and saved with `datasets` (ILR's `tokenized_dataset_path`)."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from undertow.tasks import files
from undertow.tasks.base import Kind, Record
from undertow.tasks.loaded import Splits

COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Tokenised(Splits):
    """Data sets that were tokenised before, as `datasets` saves them.

    Their columns are input_ids, attention_mask and labels. Where the mask is 0 the token is padding and is dropped: it
    is neither read nor trained on (as released, ILR trains on its pads). Labels are as models of Hugging Face take them
    (`labels[i]` is the target read off at token i-1, -100: none, as for a prompt); without the column every token is a
    target. Other columns are not read, which a warning says. The recipe names the tokenizer they were made with.

    Args:
        path: folder of a data set, or of several under the names of the splits.
        validation: folder of the one to validate on. None: the split of that name under `path`, else 5 % of the
            training sequences, by hash; the test split likewise.
    """

    path: str
    validation: str | None = None

    kind: ClassVar[Kind] = "tokens"

    def sources(self) -> Mapping[str, Any]:
        found = {split: (self.path, split) for split in _names(_open(self.path))}
        if "train" not in found:
            raise ValueError(f"{self.path}: holds {', '.join(found) or 'nothing'}; must hold train")
        if self.validation is not None:
            names = _names(_open(self.validation))
            found["validation"] = (self.validation, "validation" if "validation" in names else "train")
        return found

    def read(self, source: Any) -> Iterator[Record]:
        path, split = source
        opened = _open(path)
        rows = opened[split] if isinstance(opened, dict) else opened
        columns = [name for name in COLUMNS if name in rows.column_names]
        if "input_ids" not in columns:
            raise ValueError(f"{path}: lacks input_ids; has {', '.join(rows.column_names)}")
        self._say_unread(path, rows.column_names)
        with files.one_line(path):
            for number, row in enumerate(rows.select_columns(columns).with_format("numpy"), start=1):
                record = _kept(row, f"{path} ({split}), record {number}")
                if record["input_ids"]:
                    yield record

    def _say_unread(self, path: str, names: Sequence[str]) -> None:
        unread = [name for name in names if name not in COLUMNS]
        if unread and path not in self._said:
            self._said.add(path)
            warnings.warn(f"{path}: columns that are not read: {', '.join(unread)}", stacklevel=2)

    @cached_property
    def _said(self) -> set[str]:
        """Paths whose unread columns were named."""
        return set()

    def key(self, record: Record) -> Hashable:
        return tuple(record["input_ids"])


def _kept(row: Mapping[str, Any], where: str) -> Record:
    """The tokens that the mask keeps, with their labels. Raises ValueError where columns do not fit each other."""
    from undertow.data.packing import IGNORED

    row = {name: values for name, values in row.items() if values is not None}
    ids, labels = row["input_ids"], row.get("labels")
    for name, values in row.items():
        if len(values) != len(ids):
            raise ValueError(f"{where}: {name} has {len(values)} entries, input_ids {len(ids)}; must be equal")
    if labels is not None:
        counted = labels != IGNORED
        ahead, here = counted[:-1] & (labels[:-1] == ids[1:]), counted & (labels == ids)
        if counted[:-1].sum() > 1 and ahead.sum() == counted[:-1].sum() and not here.all() and ahead.sum() > here.sum():
            raise ValueError(f"{where}: labels are shifted already (each is the next token); must be the token's own")
    mask = row.get("attention_mask")
    keep = np.ones(len(ids), dtype=bool) if mask is None else mask.astype(bool)
    record = {"input_ids": ids[keep].tolist()}
    return record if labels is None else record | {"labels": labels[keep].tolist()}


def _open(path: str):
    import datasets

    with files.one_line(path):
        return datasets.load_from_disk(path)


def _names(opened) -> list[str]:
    """The splits of ours that it holds; a data set by itself is for training."""
    from undertow.tasks.base import SPLITS

    return [split for split in SPLITS if split in opened] if isinstance(opened, dict) else ["train"]
