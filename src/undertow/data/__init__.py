"""Text -> tokens: a corpus split by file, a tokenizer, packed rows with document borders, byte counts.

data = build("stdlib", vocab_size=4096, seq_len=256)
Trainer(model, args, train_dataset=data.train, eval_dataset=data.validation, data_collator=collate)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from undertow.data.corpus import Corpus, Document, load_corpus
from undertow.data.packing import Rows, collate, pack_documents
from undertow.data.tokenizer import check_tokenizer, check_vocabulary, load_tokenizer, token_bytes, train_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Corpus",
    "Data",
    "Document",
    "Rows",
    "build",
    "check_vocabulary",
    "collate",
    "load_corpus",
    "load_tokenizer",
    "pack_documents",
    "token_bytes",
    "train_tokenizer",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Data:
    """All that training and evaluation need of the text.

    train, validation: packed rows (see `Rows`), for any trainer together with `collate`.
    tokenizer: the tokenizer of both.
    token_bytes: int64 (V,), UTF-8 bytes of each token; nats per `validation.predicted_bytes(token_bytes)` / ln 2 are
        bits per byte.
    train_bytes, validation_bytes: UTF-8 bytes of the splits' whole texts.
    waste: fraction of the training rows that is padding.
    """

    train: Rows
    validation: Rows
    tokenizer: PreTrainedTokenizerBase
    token_bytes: Tensor
    train_bytes: int
    validation_bytes: int
    waste: float


def build(
    source: str | Sequence[str] = "stdlib",
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    vocab_size: int = 4096,
    seq_len: int = 256,
    cache_dir: str | Path | None = None,
    validation: str | Sequence[str] | None = None,
    validation_rows: int | None = None,
) -> Data:
    """Read, tokenise and pack a corpus; what an earlier call computed is read from the cache.

    Args:
        source: `"stdlib"`, text files, folders or globs; see `load_corpus`.
        tokenizer: a tokenizer, its folder or its hub id. None: one is trained on the training documents.
        vocab_size: tokens of the tokenizer that is trained; unused if one is given.
        seq_len: tokens of a row.
        cache_dir: where tokenizer and rows are kept; None: `$UNDERTOW_CACHE`, else the user's cache folder.
        validation: what to validate on, like `source`; None: about 5 % of its files.
        validation_rows: keep only so many validation rows (a fixed sample); None: all.

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """
    if validation_rows is not None and validation_rows < 1:
        raise ValueError(f"validation_rows: {validation_rows}: must be at least 1, or None for all")
    corpus = load_corpus(source, validation)
    if tokenizer is None:
        tokenizer = train_tokenizer(corpus.train, vocab_size, cache_dir)
    elif isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    else:
        check_tokenizer(tokenizer)
    train = pack_documents(corpus.train, tokenizer, seq_len, cache_dir)
    held_out = pack_documents(corpus.validation, tokenizer, seq_len, cache_dir)
    bytes_V = token_bytes(tokenizer)
    counted = held_out.text_bytes(bytes_V)
    if abs(counted - corpus.validation_bytes) > 1e-3 * corpus.validation_bytes:
        warnings.warn(
            f"the tokenizer does not keep the text: its tokens count {counted} bytes of {corpus.validation_bytes}, "
            "so bits per byte will be off by that much",
            stacklevel=2,
        )
    logger.info(
        "%d training rows of %d tokens (%.2f %% padding), %d validation rows",
        len(train),
        seq_len,
        100 * train.waste,
        len(held_out),
    )
    return Data(
        train=train,
        validation=held_out if validation_rows is None else held_out.head(validation_rows),
        tokenizer=tokenizer,
        token_bytes=bytes_V,
        train_bytes=corpus.train_bytes,
        validation_bytes=corpus.validation_bytes,
        waste=train.waste,
    )
