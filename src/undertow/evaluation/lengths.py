"""Perplexity and bits per byte at several context lengths, also longer than a model was trained on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from undertow.data import Document, Rows
from undertow.data.format import TextFormat
from undertow.data.packing import pack, rows_of, tokenise
from undertow.evaluation import tables
from undertow.evaluation.batches import most_positions
from undertow.evaluation.bits import Bits, bits_per_byte
from undertow.schedules import Schedule


@dataclass(frozen=True)
class Length:
    """The score at one context length; `bits` is None where the model has fewer learned positions."""

    length: int
    bits: Bits | None

    @property
    def perplexity(self) -> float | None:
        """e to the nats a token."""
        return None if self.bits is None else math.exp(min(self.bits.nats_per_token, 700.0))

    def to_dict(self) -> dict:
        """Plain values; None for what cannot be measured."""
        bits = {} if self.bits is None else self.bits.to_dict()
        numbers = {key: bits.get(key) for key in ("bits_per_byte", "nats", "tokens", "bytes")}
        return {"length": self.length, "perplexity": self.perplexity, **numbers}


def lengths(
    model,
    documents: Sequence[Document],
    form: TextFormat,
    token_bytes,
    lengths: Sequence[int],
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
    first: bool = False,
) -> tuple[Length, ...]:
    """Score documents packed anew into rows of each length.

    As it stands every length scores the whole text, cut into pieces of at most that many tokens: what differs is how
    much context there is. With `first` it is what is published for ILR (arXiv 2505.01855, `test_ctx_lens`): each
    document is cut to its first n tokens and the rest is left out, so that lengths differ in the text, too.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        documents: of the validation split.
        form: how they become tokens (of a tokenizer: see `packing.tokenise`).
        token_bytes: bytes of every token of the vocabulary.
        lengths: one result each, in this order.
        schedule: None takes true decoding.
        batch_size: rows of the shortest length at a time; of longer ones as many as have no more tokens.
        precision: `auto`, `float32` or `bfloat16`.

    Raises:
        ValueError: no documents, or a length below 2.
    """
    if not documents:
        raise ValueError("lengths: there are no validation documents")
    for n in lengths:
        if n < 2:
            raise ValueError(f"lengths: {n}: must be at least 2, or nothing is predicted")
    limit = most_positions(model)
    beyond = [str(n) for n in lengths if limit is not None and n > limit]
    if beyond:
        warnings.warn(
            f"lengths: {', '.join(beyond)}: not possible, the model has {limit} learned positions", stacklevel=2
        )
    form = TextFormat.of(form, trained=True)
    ids_L, counts = tokenise(documents, form)
    found = []
    for n in lengths:
        bits = None
        if limit is None or n <= limit:
            rows: Any = _rows(ids_L, counts, n, first, form)
            size = max(1, batch_size * min(lengths) // n)
            bits = bits_per_byte(model, rows, token_bytes, schedule, size, precision)
        found.append(Length(n, bits))
    return tuple(found)


def table(found: Sequence[Length]):
    """A line for every length."""
    made = tables.plain("context", "tokens", "perplexity", "bits/byte")
    for one in found:
        if one.bits is None:
            made.add_row(f"{one.length:,}", "-", "not possible", "-")
        else:
            size = f"{one.bits.bits_per_byte:.4f}"
            made.add_row(f"{one.length:,}", f"{one.bits.tokens:,}", f"{one.perplexity:.3f}", size)
    return made


def _rows(ids_L: np.ndarray, counts: np.ndarray, n: int, first: bool, form: TextFormat) -> Rows:
    if first:
        starts = np.cumsum(counts) - counts
        place_L = np.arange(len(ids_L)) - np.repeat(starts, counts)
        ids_L, counts = ids_L[place_L < n], np.minimum(counts, n)
    return rows_of(pack(ids_L, counts, n, form.tokenizer.eos_token_id, form.memory != "none"))
