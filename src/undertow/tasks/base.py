"""What a task is: where its records come from, what a model is shown of one, and how what it writes is scored.

A record is one line of a published file (plain values, JSON). `undertow data TASK --out DIR` writes the records of the
three splits as JSON lines; whether records were read back or made on the spot, everything after them is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

    from undertow.data.corpus import Reading

Record = dict[str, Any]
Kind = Literal["answers", "tags", "text", "tokens"]

SPLITS = ("train", "validation", "test")
_ATTEMPTS = 1000  # draws in a row that give nothing new, before a generator is said to be exhausted


@dataclass(frozen=True)
class Example:
    """A prompt and what is to be written after it.

    Attributes:
        prompt: the text that is given.
        response: the text to write, without an end token. The prompt ends so that the two may simply be joined.
        bucket: how hard it is, in a word or two ("depth 3", "12 actions"); accuracy is reported by bucket.
    """

    prompt: str
    response: str
    bucket: str = "all"


@dataclass(frozen=True)
class Tags:
    """A text in which every token has a target of its own (read at that token, not written after it).

    Attributes:
        input, target: texts of equally many tokens; the target of token i of `input` is token i of `target`.
        memory: for every token 1 where it takes in the memory of the token before it, 0 where it does not.
        bucket: as in `Example`.
    """

    input: str
    target: str
    memory: tuple[int, ...]
    bucket: str = "all"


class Task:
    """Base of all tasks: a frozen dataclass whose fields are its options, all with defaults.

    `kind` says what a record becomes: `answers` (`Example`), `tags` (`Tags`), `text` (`record["text"]` is a document)
    or `tokens` (`record["input_ids"]` is a document, tokenised before; `record["labels"]`, where there are any, are its
    targets: as many, -100 for none, else every token is one).
    """

    kind: ClassVar[Kind] = "answers"
    streams: ClassVar[bool] = False  # whether the training split is too large to hold

    def records(self, split: str) -> Iterator[Record]:
        """The records of `train`, `validation` or `test`, in a fixed order; the same ones every time.

        Raises:
            ValueError: one line: which file or option, its value, what is allowed.
        """
        raise NotImplementedError

    def stream(self, split: str) -> IterableDataset | None:
        """The records as a new stream of `datasets`, which can be left and continued (`state_dict`).

        None: there is only `records`, which is read from its start to continue. Nothing may be shuffled through a
        buffer: what is in it would be lost.
        """
        return None

    def example(self, record: Record) -> Example | Tags:
        """What a model is shown of a record (kinds `answers` and `tags`)."""
        raise NotImplementedError

    def correct(self, record: Record, text: str) -> bool:
        """Whether `text`, written after the prompt (or read off as tags), solves the record. Never raises."""
        raise NotImplementedError

    def key(self, record: Record) -> Hashable:
        """What makes two records the same problem, however they are written down: no key is in two splits."""
        return json.dumps(record, sort_keys=True)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The task's own tokenizer, where its vocabulary is fixed. None: any tokenizer does."""
        return None

    def reading(self) -> Reading | None:
        """Of a task that reads text files: which, and how they were split."""
        return None

    def to_dict(self) -> dict:
        """`{"task": name, option: value}`, as a recipe says it; defaults written out."""
        return {"task": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Generated(Task):
    """A task whose records are drawn: the same options and seed give the same records, no problem is in two splits.

    Test comes first, then validation, then training, each without what came before: how much is trained on changes
    nothing about what is tested.

    Args:
        train, validation, test: records of each split.
        seed: of all draws.
    """

    train: int = 20_000
    validation: int = 1_000
    test: int = 1_000
    seed: int = 0

    def __post_init__(self):
        for split in SPLITS:
            if getattr(self, split) < 0:
                raise ValueError(f"{type(self).__name__} {split}={getattr(self, split)}: must be at least 0")

    def draw(self, rng: random.Random, split: str) -> Record:
        """One record of a split (its difficulty may depend on which). Raises ValueError where none can be drawn."""
        raise NotImplementedError

    def records(self, split: str) -> Iterator[Record]:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")
        seen: set[bytes] = set()
        for name in reversed(SPLITS):
            rng = random.Random(f"{self.seed}/{name}")
            for _ in range(getattr(self, name)):
                record = self._new(rng, name, seen)
                if name == split:
                    yield record
            if name == split:
                return

    def _new(self, rng: random.Random, split: str, seen: set[bytes]) -> Record:
        for _ in range(_ATTEMPTS):
            record = self.draw(rng, split)
            key = hashlib.blake2b(repr(self.key(record)).encode(), digest_size=12).digest()
            if key not in seen:
                seen.add(key)
                return record
        raise ValueError(
            f"{type(self).__name__} {split}={getattr(self, split)}: only {len(seen)} different problems were found "
            "(all splits together); ask for fewer, or for harder ones"
        )
