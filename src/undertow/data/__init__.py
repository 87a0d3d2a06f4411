"""Text and tasks -> tokens: a tokenizer, packed rows with borders, byte counts; all at once or as a stream.

data = build("stdlib", vocab_size=4096, seq_len=256)
data = build(S5(train=10_000), seq_len=256)
Trainer(model, args, train_dataset=data.train, eval_dataset=data.validation, data_collator=collate)
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from undertow.data import fingerprint
from undertow.data.corpus import Corpus, Document, Reading, load_corpus
from undertow.data.examples import has_examples, record_rows, texts
from undertow.data.fingerprint import Fingerprint
from undertow.data.format import Layout, Memory, SpecialTokens, TextFormat, checked, pad_left
from undertow.data.packing import Rows, collate, pack_documents
from undertow.data.stream import Chunks, Stream, first_records
from undertow.data.tokenizer import budget, check_vocabulary, load_tokenizer, token_bytes, train_tokenizer
from undertow.tasks.base import Record, Task
from undertow.tasks.parse import open_source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Corpus",
    "Data",
    "Document",
    "Reading",
    "Rows",
    "Stream",
    "TextFormat",
    "build",
    "check_vocabulary",
    "collate",
    "load_corpus",
    "load_tokenizer",
    "pack_documents",
    "pad_left",
    "token_bytes",
    "train_tokenizer",
]

Part = Literal["response", "all"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Data:
    """All that training and evaluation need of the text.

    Attributes:
        train: packed rows (see `Rows`), for any trainer together with `collate`; of a stream all, without end.
        validation: packed rows.
        tokenizer: the tokenizer of both.
        token_bytes: int64 `_V`, UTF-8 bytes of each token; nats of the tokens that have any, per
            `validation.predicted_bytes(token_bytes)` / ln 2, are bits per byte.
        train_bytes, validation_bytes: UTF-8 bytes of the splits' whole texts; of a task, of its rows (None: a
            stream's).
        format: how a text becomes tokens, as in the rows; its tokenizer carries it.
        texts: which texts these are, see `fingerprint`.
        task: where the records come from (None: text files).
        reading: of text files, which were read and how they were split.
    """

    train: Rows | Stream
    validation: Rows
    tokenizer: PreTrainedTokenizerBase
    token_bytes: Tensor
    train_bytes: int | None
    validation_bytes: int
    format: TextFormat
    texts: Fingerprint
    task: Task | None = None
    reading: Reading | None = None

    @property
    def sizes(self) -> str:
        """How much is trained and validated on, in a line."""
        if self.reading is not None:
            return str(self.reading)
        train = "a stream" if isinstance(self.train, Stream) else f"{len(self.train):,} rows"
        return f"training on {train}, validating on {len(self.validation):,} rows"

    @property
    def waste(self) -> float | None:
        """Fraction of the training rows that is padding (None: a stream; `train.head(n).waste` says it of n rows)."""
        return self.train.waste


def build(
    source: str | Sequence[str] | Mapping[str, Any] | Task = "stdlib",
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | TextFormat | None = None,
    vocab_size: int = 4096,
    seq_len: int = 256,
    cache_dir: str | Path | None = None,
    validation: str | Sequence[str] | None = None,
    validation_rows: int | None = None,
    loss: Part | None = None,
    memory: Memory | None = None,
    bos: bool | None = None,
    eos: bool = True,
    special_tokens: SpecialTokens = "text",
    layout: Layout | None = None,
    stream: bool = False,
    documents: int = 2000,
    tokenizer_characters: int | None = None,
) -> Data:
    """Read, tokenise and pack a corpus or a task; what an earlier call computed is read from the cache.

    Args:
        source: `"stdlib"`, text files, folders or globs, see `load_corpus`; or a task, see `open_source`.
        tokenizer: a tokenizer, its folder or its hub id; or a whole format, which then holds instead of `loss`,
            `memory`, `bos`, `eos`, `special_tokens` and `layout`. None: the task's own tokenizer, or else one is
            trained on the training records (of a stream, on its first chunk).
        vocab_size: tokens of the tokenizer that is trained; unused if there is one.
        seq_len: tokens of a row.
        cache_dir: where tokenizer and rows are kept; None: `$UNDERTOW_CACHE`, else the user's cache folder.
        validation: what to validate on, like `source`; None: about 5 % of its files. A task has a split of its own.
        validation_rows: keep only so many validation rows (a fixed sample); None: all.
        loss, memory, bos, eos, special_tokens, layout: see `TextFormat`. None: `loss` and `memory` of examples the
            response, of documents all; a bos but for tags, and for records that are tokenised already and begin
            without one; of tasks with answers a chat where the tokenizer has a template.
        stream: make the training rows of a task when they are asked for, a chunk at a time; validation is then on the
            first `documents` records of its split.
        documents: records of a chunk.
        tokenizer_characters: the tokenizer is trained on so many characters of the training texts, see
            `tokenizer.budget`. None: on all (of a stream, on its first chunk).

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """
    if validation_rows is not None and validation_rows < 1:
        raise ValueError(f"validation_rows: {validation_rows}: must be at least 1, or None for all")
    task = open_source(source)
    if tokenizer_characters is not None and (tokenizer is not None or (task is not None and task.tokenizer())):
        raise ValueError(f"tokenizer_characters: {tokenizer_characters}: no tokenizer is trained, there is one")
    whole = tokenizer if isinstance(tokenizer, TextFormat) else None
    chosen: dict[str, Any] = {
        "loss": loss,
        "memory": memory,
        "bos": bos,
        "eos": eos,
        "special_tokens": special_tokens,
        "layout": layout,
    }
    given = chosen if whole is None else {"memory": whole.memory if whole.memory == "response" else None}
    wrong = misuse(task, stream=stream, validation=validation, **given)
    if wrong is not None:
        raise ValueError(": ".join(wrong))

    def form(tokenizer: PreTrainedTokenizerBase, first: Record | None = None) -> TextFormat:
        return whole or checked(format_of(task, tokenizer, first, **chosen).carried())

    if task is None:
        data = _of_text(source, validation, tokenizer, form, vocab_size, seq_len, cache_dir, tokenizer_characters)
    else:
        data = _of_task(task, stream, tokenizer, form, vocab_size, seq_len, documents, cache_dir, tokenizer_characters)
    return data if validation_rows is None else replace(data, validation=data.validation.head(validation_rows))


def misuse(
    task: Task | None,
    loss=None,
    memory=None,
    stream: bool = False,
    validation=None,
    bos=None,
    eos: bool = True,
    special_tokens: str = "text",
    layout=None,
) -> tuple[str, str] | None:
    """An argument of `build` that has no meaning for this task (None: text files), and why; None: all have one."""
    what = "text" if task is None else type(task).__name__
    for name, value in (("loss", loss), ("memory", memory)):
        if value == "response" and (task is None or not has_examples(task)):
            return name, f"{value!r}: {what} has no prompt and response; allowed: 'all'"
    if layout == "chat" and (task is None or task.kind != "answers"):
        return "layout", f"{layout!r}: {what} has no prompt that is answered; allowed: 'plain'"
    if not eos and task is not None and task.kind != "text":
        return "eos", f"{eos}: does not apply to {what}: it has no documents of text to end"
    if bos and task is not None and task.kind == "tags":
        return "bos", f"{bos}: does not apply to {what}: every token has a target of its own"
    if special_tokens != "text" and task is not None and task.kind == "tokens":
        return "special_tokens", f"{special_tokens!r}: does not apply to {what}, which is tokenised already"
    if validation is not None and task is not None:
        return "validation", f"{validation!r}: {what} has a validation split of its own"
    if stream and task is None:
        return "stream", "only tasks are read as a stream, e.g. source: FineWeb(path='shards/*.parquet')"
    return None


def format_of(
    task: Task | None,
    tokenizer: PreTrainedTokenizerBase,
    first: Record | None = None,
    loss: Part | None = None,
    memory: Memory | None = None,
    bos: bool | None = None,
    eos: bool = True,
    special_tokens: SpecialTokens = "text",
    layout: Layout | None = None,
) -> TextFormat:
    """How the texts of a task (None: of text files) are read; arguments as of `build`.

    Args:
        first: its first record, where it is at hand: of kind `tokens` it says whether texts begin with a bos.
    """
    part: Part = "response" if task is not None and has_examples(task) else "all"
    if bos is None and task is not None and task.kind == "tokens" and first is not None:
        bos = list(first.get("input_ids") or ())[:1] == [tokenizer.bos_token_id]
    elif bos is None:
        bos = task is None or task.kind != "tags"
    answers = task is not None and task.kind == "answers"
    shape = layout or (None if answers else "plain")
    return TextFormat(tokenizer, loss or part, memory or part, bos, eos, special_tokens, shape)


def _of_text(source, validation, tokenizer, form, vocab_size: int, seq_len: int, cache_dir, characters) -> Data:
    corpus = load_corpus(source, validation)
    if tokenizer is None:
        shown = corpus.train if characters is None else budget((one.text for one in corpus.train), characters)
        read = form(train_tokenizer(shown, vocab_size, cache_dir))
    else:
        read = form(_given(tokenizer))
    read.say_spelt((document.text for document in (*corpus.train, *corpus.validation)), "the texts")
    train = pack_documents(corpus.train, read, seq_len, cache_dir)
    held_out = pack_documents(corpus.validation, read, seq_len, cache_dir)
    bytes_V = token_bytes(read.tokenizer)
    if read.special_tokens == "text":
        _check_bytes(held_out.text_bytes(bytes_V), corpus.validation_bytes)
    _log(train, held_out, seq_len)
    seen = {split: fingerprint.of_documents(getattr(corpus, split)) for split in ("train", "validation")}
    sizes = (corpus.train_bytes, corpus.validation_bytes)
    return Data(train, held_out, read.tokenizer, bytes_V, *sizes, read, seen, reading=corpus.reading)


def _of_task(
    task: Task, stream: bool, tokenizer, form, vocab_size: int, seq_len: int, documents: int, cache_dir, characters
) -> Data:
    records = {split: _records(task, split, documents if stream else None) for split in ("train", "validation")}
    own = task.tokenizer() if tokenizer is None else _given(tokenizer)
    if own is None and task.kind == "tokens":
        raise ValueError(f"tokenizer: {type(task).__name__} is tokenised already: name the tokenizer that was used")
    if own is None:
        if characters is None:
            shown = [Document(str(i), text) for i, text in enumerate(texts(records["train"], task))]
        else:  # on as many records as that takes, however long a chunk is
            shown = budget((text for one in first_records(task, "train") for text in texts([one], task)), characters)
        own = train_tokenizer(shown, vocab_size, cache_dir)
    read = form(own, records["train"][0])
    if task.kind != "tokens":
        read.say_spelt(itertools.chain.from_iterable(texts(held, task) for held in records.values()), "the texts")
    train: Rows | Stream
    if stream:
        train = Stream(Chunks(task, "train", read, seq_len, documents, cache_dir))
    else:
        train = record_rows(records["train"], task, read, seq_len, cache_dir)
    held_out = record_rows(records["validation"], task, read, seq_len, cache_dir)
    bytes_V = token_bytes(read.tokenizer)
    size = held_out.text_bytes(bytes_V)
    if task.kind == "text" and read.special_tokens == "text":
        _check_bytes(size, sum(len(text.encode()) for text in texts(records["validation"], task) if text.strip()))
    _log(train, held_out, seq_len)
    train_size = train.text_bytes(bytes_V) if isinstance(train, Rows) else None
    seen = {split: fingerprint.of_records(fingerprint.contents(held, task)) for split, held in records.items()}
    test = fingerprint.of_test(task)
    seen |= {} if test is None else {"test": test}
    return Data(train, held_out, read.tokenizer, bytes_V, train_size, size, read, seen, task, task.reading())


def _records(task: Task, split: str, limit: int | None) -> list[Record]:
    """The records of a split (None: all of them). Raises ValueError: there are none."""
    found = list(task.records(split) if limit is None else itertools.islice(first_records(task, split), limit))
    if not found:
        raise ValueError(f"{type(task).__name__}: there are no records in its {split} split")
    return found


def _given(tokenizer: str | Path | PreTrainedTokenizerBase | TextFormat) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, TextFormat):
        return tokenizer.tokenizer
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer


def _check_bytes(counted: int, size: int) -> None:
    if abs(counted - size) > 1e-3 * size:
        warnings.warn(
            f"the tokenizer does not keep the text: its tokens count {counted} bytes of {size}, "
            "so bits per byte will be off by that much",
            stacklevel=4,
        )


def _log(train: Rows | Stream, held_out: Rows, seq_len: int) -> None:
    said = "training rows come as a stream"
    if isinstance(train, Rows):
        said = f"{len(train)} training rows of {seq_len} tokens ({100 * train.waste:.2f} % padding)"
    logger.info("%s, %d validation rows (%.2f %% padding)", said, len(held_out), 100 * held_out.waste)
