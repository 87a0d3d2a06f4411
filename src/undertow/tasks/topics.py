"""CSV files of topics and texts, as the GPT-2 experiments with tiny recursive blocks (GPTTRM) use them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from undertow.tasks import files
from undertow.tasks.base import Kind, Record
from undertow.tasks.loaded import Splits


@dataclass(frozen=True)
class Topics(Splits):
    """CSV files with the columns topic and text, named as in GPTTRM.

    A row is a document. Only the text is trained on. As published, what is tested on is what is validated on;
    training texts that occur there are left out.

    Args:
        train, validation, test: the files.
    """

    train: str = "data/train_data.csv"
    validation: str = "data/valid_data.csv"
    test: str = "data/valid_data.csv"

    kind: ClassVar[Kind] = "text"

    def sources(self) -> Mapping[str, Any]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def read(self, source: str) -> Iterator[Record]:
        for record in files.read(source, ("topic", "text")):
            if record["text"].strip():
                yield {"topic": record["topic"], "text": record["text"]}

    def key(self, record: Record) -> str:
        return record["text"]
