"""Documents that were tokenised before and saved with `datasets` (ILR's `tokenized_dataset_path`)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from undertow.tasks import files
from undertow.tasks.base import Kind, Record
from undertow.tasks.loaded import Splits


@dataclass(frozen=True)
class Tokenised(Splits):
    """Data sets that were tokenised before, as `datasets` saves them.

    Their columns are input_ids and attention_mask. Where the mask is 0 the token is padding and is
    dropped: it is neither read nor trained on (as released, ILR trains on its pads). The recipe names the tokenizer
    they were made with.

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
        if "input_ids" not in rows.column_names:
            raise ValueError(f"{path}: lacks input_ids; has {', '.join(rows.column_names)}")
        masked = "attention_mask" in rows.column_names
        rows = rows.select_columns(["input_ids", "attention_mask"] if masked else ["input_ids"]).with_format("numpy")
        with files.one_line(path):
            for row in rows:
                ids = row["input_ids"][row["attention_mask"].astype(bool)] if masked else row["input_ids"]
                if len(ids):
                    yield {"input_ids": ids.tolist()}

    def key(self, record: Record) -> Hashable:
        return tuple(record["input_ids"])


def _open(path: str):
    import datasets

    with files.one_line(path):
        return datasets.load_from_disk(path)


def _names(opened) -> list[str]:
    """The splits of ours that it holds; a data set by itself is for training."""
    from undertow.tasks.base import SPLITS

    return [split for split in SPLITS if split in opened] if isinstance(opened, dict) else ["train"]
