"""Scores at several context lengths, also longer than a model was trained on.

`lengths` scores the whole text in pieces of each length; `first_tokens` the first tokens of each text alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from undertow.data import Document
from undertow.data.format import TextFormat
from undertow.data.packing import pack, rows_of, tokenise
from undertow.evaluation import tables
from undertow.evaluation.batches import batches, most_positions, padded
from undertow.evaluation.bits import Bits, bits_per_byte
from undertow.schedules import Schedule
from undertow.training.precision import autocast


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
) -> tuple[Length, ...]:
    """Score documents packed anew into rows of each length.

    Every length scores the whole text, cut into pieces of at most that many tokens: what differs is how much context
    there is.

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
    possible = _possible(model, lengths, documents)
    form = TextFormat.of(form, trained=True)
    ids_L, counts = tokenise(documents, form)
    found = []
    for n in lengths:
        bits = None
        if n in possible:
            rows: Any = rows_of(pack(ids_L, counts, n, form.tokenizer.eos_token_id, form.memory != "none"))
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


@dataclass(frozen=True)
class Cut:
    """The score of texts cut to their first `length` tokens; `loss` is None where the model has fewer positions.

    Attributes:
        length: tokens a text is cut to; `texts`, `tokens`: how many were scored, and tokens predicted in them.
        loss: the mean over texts of the mean nats a token of each.
    """

    length: int
    texts: int
    tokens: int
    loss: float | None

    @property
    def perplexity(self) -> float | None:
        """e to the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict:
        """Plain values; None for what cannot be measured."""
        return {**asdict(self), "perplexity": self.perplexity}


@torch.no_grad()
def first_tokens(
    model,
    texts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> tuple[Cut, ...]:
    """Score every text cut to its first n tokens, for each n: ILR's `test_ctx_lens` (arXiv 2505.01855).

    The loss is the mean over texts of each text's mean; a text shorter than n counts as it is, and one of a single
    token, in which nothing is predicted, does not count. Lengths differ in what is scored, not in the context alone.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        texts: token ids of each validation text, as the model reads them.
        lengths: one result each, in this order.
        schedule: None takes true decoding.
        batch_size: texts of the shortest length at a time; of longer ones as many as have no more tokens.
        precision: `auto`, `float32` or `bfloat16`.

    Raises:
        ValueError: no text of two tokens, or a length below 2.
    """
    texts = [text for text in texts if len(text) > 1]
    possible = _possible(model, lengths, texts)
    found = []
    for n in lengths:
        cut, means, tokens = [text[:n] for text in texts], [], 0
        if n not in possible:
            found.append(Cut(n, 0, 0, None))
            continue
        for rows in batches([len(text) for text in cut], max(1, batch_size * min(lengths) // n)):
            ids_BT = padded([cut[i] for i in rows], 0).to(model.device)
            sizes_B1 = torch.tensor([[len(cut[i])] for i in rows], device=model.device)
            real_BT = torch.arange(ids_BT.shape[1], device=model.device) < sizes_B1
            with autocast(precision, model.device):
                out = model(ids_BT, attention_mask=real_BT.long(), schedule=schedule, use_cache=False)
            for logits_TV, ids_T, size in zip(out.logits, ids_BT, sizes_B1[:, 0].tolist(), strict=True):
                means.append(float(functional.cross_entropy(logits_TV[: size - 1].float(), ids_T[1:size])))
                tokens += size - 1
        found.append(Cut(n, len(means), tokens, math.fsum(means) / len(means)))
    return tuple(found)


def cut_table(found: Sequence[Cut]):
    """A line for every length."""
    made = tables.plain("first tokens", "texts", "tokens", "nats/token", "perplexity")
    for one in found:
        if one.loss is None:
            made.add_row(f"{one.length:,}", "-", "-", "not possible", "-")
        else:
            made.add_row(
                f"{one.length:,}", f"{one.texts:,}", f"{one.tokens:,}", f"{one.loss:.4f}", f"{one.perplexity:.3f}"
            )
    return made


def _possible(model, lengths: Sequence[int], texts: Sequence) -> set[int]:
    """The lengths that a model has positions for; of the others, one warning. Raises ValueError for bad arguments."""
    if not texts:
        raise ValueError("lengths: there are no validation documents")
    for n in lengths:
        if n < 2:
            raise ValueError(f"lengths: {n}: must be at least 2, or nothing is predicted")
    limit = most_positions(model)
    beyond = [str(n) for n in lengths if limit is not None and n > limit]
    if beyond:
        warnings.warn(
            f"lengths: {', '.join(beyond)}: not possible, the model has {limit} learned positions", stacklevel=3
        )
    return {n for n in lengths if limit is None or n <= limit}
