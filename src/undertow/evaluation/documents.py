"""The validation split as documents, before it was cut into rows."""

from __future__ import annotations

from itertools import islice

from undertow.data import Document, load_corpus
from undertow.data.packing import tokenise
from undertow.tasks.base import Record, Tags, Task


def validation_documents(source, validation, task: Task | None, tokenizer, most: int | None = None) -> list[Document]:
    """The first `most` documents (None: all) that a run is validated on.

    Of a task of kind `text` a record's text, of `tokens` its tokens as text, of `answers` prompt and response, of
    `tags` the input.

    Args:
        source, validation: of plain text, as `undertow.data.load_corpus` takes them.
        task: where the data is a task; `source` is then not read.
    """
    if task is None:
        return list(load_corpus(source, validation).validation[:most])
    records = islice(task.records("validation"), most)
    return [Document(f"validation/{i}", _text(task, record, tokenizer)) for i, record in enumerate(records)]


def validation_tokens(source, validation, task: Task | None, tokenizer, most: int | None = None) -> list[list[int]]:
    """Token ids of the first `most` documents: what was tokenised before as it is, else as a row would hold them.

    Args: as in `validation_documents`.
    """
    if task is not None and task.kind == "tokens":
        return [list(record["input_ids"]) for record in islice(task.records("validation"), most)]
    ids_L, counts = tokenise(validation_documents(source, validation, task, tokenizer, most), tokenizer)
    ends = counts.cumsum()
    return [ids_L[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]


def _text(task: Task, record: Record, tokenizer) -> str:
    if task.kind == "text":
        return record["text"]
    if task.kind == "tokens":
        return tokenizer.decode(record["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    example = task.example(record)
    return example.input if isinstance(example, Tags) else example.prompt + example.response
