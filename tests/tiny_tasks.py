"""Tiny tasks of every kind, for tests of what is made of a task's records."""

import random
from dataclasses import dataclass
from typing import ClassVar

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from undertow.tasks import Example, Generated, Tags, Task


@dataclass(frozen=True)
class Sums(Generated):
    """a + b, of different lengths."""

    train: int = 60
    validation: int = 12
    test: int = 12
    digits: int = 3

    def draw(self, rng, split):
        return {"a": rng.randrange(10 ** rng.randint(1, self.digits)), "b": rng.randrange(10**self.digits)}

    def example(self, record):
        return Example(f"{record['a']} + {record['b']} = ", str(record["a"] + record["b"]), f"{len(str(record['a']))}")

    def correct(self, record, text):
        return text == str(record["a"] + record["b"])


@dataclass(frozen=True)
class Parity(Generated):
    """The parity so far, at every bit; a word a token. Memory is read but at every fifth."""

    kind: ClassVar = "tags"
    train: int = 60
    validation: int = 12
    test: int = 12

    def draw(self, rng, split):
        return {"bits": [rng.randrange(2) for _ in range(rng.randint(3, 9))]}

    def example(self, record):
        bits = record["bits"]
        target = " ".join("odd" if sum(bits[: i + 1]) % 2 else "even" for i in range(len(bits)))
        return Tags(" ".join(map(str, bits)), target, tuple(int(i % 5 > 0) for i in range(len(bits))))

    def tokenizer(self):
        words = Tokenizer(
            models.WordLevel({w: i for i, w in enumerate(["[E]", "0", "1", "even", "odd"])}, unk_token="[E]")
        )
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[E]", pad_token="[E]")


@dataclass(frozen=True)
class Pages(Task):
    """Documents of different lengths, some blank."""

    kind: ClassVar = "text"
    streams: ClassVar = True
    count: int = 47
    seed: int = 0

    def records(self, split):
        rng = random.Random(f"{split}/{self.seed}")
        for i in range(self.count if split == "train" else 6):
            words = rng.choices(["the", "current", "beneath", "a", "naïve", "surface", "流れ"], k=rng.randint(1, 60))
            yield {"text": "" if i % 10 == 7 else f"{split} {i} " + " ".join(words)}


@dataclass(frozen=True)
class Sharded(Pages):
    """The same documents as parquet files in a folder, `write` makes them."""

    folder: str = ""

    def write(self):
        import pyarrow
        from pyarrow import parquet

        for split in ("train", "validation"):
            records = list(super().records(split))
            for shard in range(3):
                table = pyarrow.table({"text": [record["text"] for record in records[shard * 20 : shard * 20 + 20]]})
                if len(table):
                    parquet.write_table(table, f"{self.folder}/{split}-{shard}.parquet", row_group_size=6)
        return self

    def stream(self, split):
        import datasets

        files = f"{self.folder}/{split}-*.parquet"
        found = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        return found.filter(lambda record: len(record["text"]) != 3)

    def records(self, split):
        return iter(self.stream(split))


@dataclass(frozen=True)
class Blocks(Task):
    """Token ids of a byte-level vocabulary of 257."""

    kind: ClassVar = "tokens"
    count: int = 20
    largest: int = 256

    def records(self, split):
        rng = random.Random(split)
        for _ in range(self.count):
            yield {"input_ids": [rng.randint(0, self.largest) for _ in range(rng.randint(0, 40))]}


CLASSES = {cls.__name__: cls for cls in (Sums, Parity, Pages, Sharded, Blocks)}
