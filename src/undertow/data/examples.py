"""A task's examples as tokens: the same for training rows, for scoring and for generation."""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from undertow.data import cache
from undertow.data.corpus import Document
from undertow.data.packing import IGNORED, Rows, kept, pack, pad_id, place, rows_of, tokenise
from undertow.data.tokenizer import tokenizer_hash, vocabulary_size
from undertow.tasks.base import Example, Record, Tags, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_RECIPE = "records-1"  # part of the cache key: change it when the stored rows would differ


@dataclass(frozen=True)
class Encoded:
    """One example as tokens; the lists have one entry a token.

    Attributes:
        ids: bos (where the tokenizer has one), prompt, response, eos; of tags the input and eos.
        labels: in the model's convention, `labels[t]` is the target of position t-1; -100 where there is none.
        memory: 1 where the token takes in the memory of the one before it (T2MLR's control flow 2), 0 where not.
        prompt: how many tokens are given when the response is generated.
    """

    ids: list[int]
    labels: list[int]
    memory: list[int]
    prompt: int


@dataclass(frozen=True)
class Encoder:
    """Examples -> tokens.

    Args:
        tokenizer: with an eos token. Where it has a chat template, the prompt is the user's turn of a chat.
        loss: `response`: the prompt is not to be predicted; `all`: every token is. Tags are all targets.
        memory: `response`: the prompt takes in no memory; `all`: every token does.
    """

    tokenizer: PreTrainedTokenizerBase
    loss: Literal["response", "all"] = "response"
    memory: Literal["response", "all"] = "response"

    def __call__(self, example: Example | Tags) -> Encoded:
        """Raises ValueError (one line): the input and the target of tags differ in tokens."""
        if isinstance(example, Tags):
            return self._tags(example)
        prompt = self.prompt(example)
        response = [*self._plain(example.response), self.tokenizer.eos_token_id]
        given = [IGNORED] * len(prompt) if self.loss == "response" else prompt
        return Encoded(
            ids=[*prompt, *response],
            labels=[IGNORED, *[*given, *response][1:]],  # nothing stands before the first token to predict it
            memory=[*self.given_memory(prompt), *[1] * len(response)],
            prompt=len(prompt),
        )

    def prompt(self, example: Example) -> list[int]:
        """The tokens that are given when the response is generated."""
        if getattr(self.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": example.prompt.rstrip()}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        before = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return [*before, *self._plain(example.prompt)]

    def given_memory(self, prompt: list[int]) -> list[int]:
        """The memory mask of a prompt's tokens."""
        return [int(self.memory == "all")] * len(prompt)

    def _tags(self, tags: Tags) -> Encoded:
        ids, target = self._plain(tags.input), self._plain(tags.target)
        if not len(ids) == len(target) == len(tags.memory):
            raise ValueError(
                f"tags: input has {len(ids)} tokens, target {len(target)}, memory {len(tags.memory)}: must be equal"
            )
        memory = list(tags.memory) if self.memory == "response" else [1] * len(ids)
        return Encoded([*ids, self.tokenizer.eos_token_id], [IGNORED, *target], [*memory, 1], len(ids))

    def _plain(self, text: str) -> list[int]:
        # A text that spells out a special token does not become one.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def parts(self) -> list[str]:
        """What decides how a record is encoded, for cache keys."""
        template = json.dumps(getattr(self.tokenizer, "chat_template", None))
        return [_RECIPE, tokenizer_hash(self.tokenizer), template, self.loss, self.memory]


def pad_left(sequences: Sequence[Sequence[int]], pad: int, memory: Sequence[Sequence[int]] | None = None):
    """Sequences of tokens as one batch that ends together, for generation.

    Args:
        sequences: at least one.
        pad: the id written at padding.
        memory: memory masks of the same lengths.

    Returns:
        `input_ids` and `attention_mask` (0 at padding), and `memory_mask` (1 at padding) if `memory` is given: int64
        tensors of shape (B, T), T the length of the longest.
    """
    import torch

    width = max(map(len, sequences))

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])

    batch = {"input_ids": padded(sequences, pad), "attention_mask": padded([[1] * len(row) for row in sequences], 0)}
    return batch if memory is None else batch | {"memory_mask": padded(memory, 1)}


def texts(records: Sequence[Record], task: Task) -> list[str]:
    """The whole text of each record (kinds `text`, `answers` and `tags`): what a tokenizer is trained on."""
    if task.kind == "text":
        return [_field(record, "text", task) for record in records]
    shown = [task.example(record) for record in records]
    return [f"{e.prompt}{e.response}" if isinstance(e, Example) else f"{e.input}\n{e.target}" for e in shown]


def record_rows(
    records: Sequence[Record], task: Task, encoder: Encoder, seq_len: int, cache_dir: str | Path | None = None
) -> Rows:
    """Records as packed rows, or the rows that an earlier call left in `cache_dir`.

    Documents (kinds `text`, `tokens`) are cut where they are longer than a row; an example never is: those that are too
    long are left out, with one warning that counts them.

    Raises:
        ValueError: `seq_len` is below 2, nothing is left, or what `pack_records` raises. One line.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len: {seq_len}: must be at least 2, or nothing is predicted")
    name = type(task).__name__
    field = "text" if task.kind == "text" else "input_ids"
    contents = (
        repr(task.example(r)) if has_examples(task) else f"{_field(r, field, task)}{r.get('labels') or ''}"
        for r in records
    )
    key = cache.digest(itertools.chain(encoder.parts(), [task.kind, seq_len], contents))

    def packed_RCT() -> np.ndarray:
        logger.info("tokenising %d records of %s", len(records), name)
        return pack_records(records, task, encoder, seq_len)

    rows = rows_of(kept(cache.folder(cache_dir) / f"rows-{key[:24]}.npy", seq_len, packed_RCT))
    if len(rows) == 0:
        why = f"all are longer than seq_len={seq_len} tokens" if has_examples(task) else "they hold no text"
        raise ValueError(f"{name}: none of {len(records)} records can be used: {why}")
    if has_examples(task):
        report_left_out(len(records) - rows.pieces, len(records), task, seq_len)
    return rows


def report_left_out(count: int, of: int, task: Task, seq_len: int) -> None:
    """Warn that examples were left out, if any were."""
    if count:
        name = type(task).__name__
        warnings.warn(f"{name}: {count} of {of} examples are longer than seq_len={seq_len}: left out", stacklevel=3)


def has_examples(task: Task) -> bool:
    """Whether its records are examples, which are never cut; else they are documents."""
    return task.kind in ("answers", "tags")


def pack_records(records: Sequence[Record], task: Task, encoder: Encoder, seq_len: int) -> np.ndarray:
    """Records as packed rows, int32 (R, C, T) as `packing.place` makes them; R = 0 where none can be used.

    Raises:
        ValueError: a record lacks its text or its ids, an id or a label is not in the vocabulary, or what `Encoder`
            raises.
    """
    pad = pad_id(encoder.tokenizer)
    if task.kind == "text":
        documents = [Document("", text) for text in texts(records, task) if text.strip()]
        return pack(*tokenise(documents, encoder.tokenizer), seq_len, pad)
    if task.kind == "tokens":
        documents_ids = [_ids(record, task, encoder.tokenizer) for record in records]
        parts = [ids for ids in documents_ids if len(ids)]
        lengths = np.array([len(ids) for ids in parts], dtype=np.int64)
        labels_L = None
        if any(record.get("labels") is not None for record in records):
            size = vocabulary_size(encoder.tokenizer)
            labels = [_labels(r, ids, task, size) for r, ids in zip(records, documents_ids, strict=True)]
            labels_L = _line(labels)
        return pack(_line(parts), lengths, seq_len, pad, labels_L)
    encoded = [encoder(task.example(record)) for record in records]
    encoded = [one for one in encoded if len(one.ids) <= seq_len]
    lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)
    labels_L, memory_L = _line([one.labels for one in encoded]), _line([one.memory for one in encoded])
    return place(lengths, seq_len, (_line([one.ids for one in encoded]), pad), (labels_L, IGNORED), (memory_L, 1))


def _line(parts: Sequence[Sequence[int]]) -> np.ndarray:
    """All parts one after the other, int32 (L,)."""
    return np.fromiter(itertools.chain.from_iterable(parts), dtype=np.int32)


def _field(record: Record, field: str, task: Task):
    if record.get(field) is None:
        raise ValueError(
            f"{type(task).__name__}: a record lacks {field}; has {', '.join(map(str, record)) or 'nothing'}"
        )
    return record[field]


def _ids(record: Record, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids, size = list(_field(record, "input_ids", task)), vocabulary_size(tokenizer)
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise ValueError(f"{type(task).__name__}: token id {wrong} is not in the tokenizer's vocabulary of {size}")
    return ids


def _labels(record: Record, ids: list[int], task: Task, size: int) -> list[int]:
    """A record's own labels, its tokens where it has none."""
    labels = ids if record.get("labels") is None else list(record["labels"])
    if len(labels) != len(ids):
        raise ValueError(f"{type(task).__name__}: a record has {len(labels)} labels, but {len(ids)} tokens")
    wrong = next((i for i in labels if i != IGNORED and not 0 <= i < size), None)
    if wrong is not None:
        raise ValueError(f"{type(task).__name__}: label {wrong} is neither -100 nor in the vocabulary of {size}")
    return labels
