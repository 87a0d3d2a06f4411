"""Sampling, and the cached recurrence of a batch whose rows come and go.

The cache is all the state: a row joins by being padded on the left (pads are masked and every position encoding counts
from a row's own start, so what the row holds does not change) and leaves by being selected away.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from undertow.cache import UndertowCache
from undertow.data.format import TextFormat, Tokens, pad_left
from undertow.decode import COLDEST
from undertow.serve.text import Text
from undertow.stepper import Stepper


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together have at least this probability.
        top_k: sample among this many likeliest tokens; 0: all.
        seed: None draws one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def generator(self, index: int = 0) -> torch.Generator:
        """A generator of its own for every row, so that no row's text depends on its batch mates."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed + index)


def choose(logits_V: Tensor, how: Sampling, generator: torch.Generator) -> int:
    """The next token, by one uniform number and the inverse of the distribution, in float64 on the CPU."""
    if how.temperature < COLDEST:
        return int(logits_V.argmax())
    p_V = (logits_V.double().cpu() / how.temperature).softmax(-1)
    order_V = None
    if how.top_p < 1 or how.top_k:
        p_V, order_V = p_V.sort(descending=True, stable=True)
        before_V = p_V.cumsum(0) - p_V
        most = how.top_k or len(p_V)
        keep_V = (before_V < how.top_p) & (torch.arange(len(p_V)) < most)
        keep_V[0] = True
        p_V = p_V * keep_V
    total_V = p_V.cumsum(0)
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * total_V[-1]
    at = int(torch.searchsorted(total_V, drawn, right=True).clamp(max=int((p_V > 0).nonzero().max())))
    return at if order_V is None else int(order_V[at])


@torch.no_grad()
def prefill(
    model, prompts: Sequence[Sequence[int]], memory: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, UndertowCache]:
    """Logits `_BV` of the next token of every prompt (none empty), and the cache of all of them, padded on the left.

    memory: for every token of each prompt 1 where it takes in the memory of the one before it (None: all do).
    """
    out = model(**pad_left(prompts, 0, memory, model.device), use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


@torch.no_grad()
def step(model, tokens: Sequence[int], cache: UndertowCache, memory: bool = True) -> Tensor:
    """Logits `_BV` after one more token a row; the cache takes the tokens in. memory: whether they take in theirs."""
    ids_B1 = torch.tensor(tokens, device=model.device)[:, None]
    off = {} if memory else {"memory_mask": torch.zeros_like(ids_B1)}
    return model(ids_B1, attention_mask=mask_with(cache, 1), past_key_values=cache, **off).logits[:, -1]


def mask_with(cache: UndertowCache, new: int) -> Tensor | None:
    """The attention mask of `new` more tokens (None: there are no pads)."""
    documents = cache.documents_BT
    return None if documents is None else F.pad((documents != 0).long(), (0, new), value=1)


def join(a: UndertowCache, b: UndertowCache) -> UndertowCache:
    """The rows of `a`, then those of `b`, the shorter ones padded on the left."""
    T = max(a.length, b.length)
    kv = []
    for x, y in zip(a.layers, b.layers, strict=True):
        both = ((x.keys, y.keys), (x.values, y.values))
        kv.append(tuple(torch.cat([F.pad(t, (0, 0, T - t.shape[2], 0)) for t in pair]) for pair in both))
    documents = torch.cat([F.pad(_documents(cache), (T - cache.length, 0)) for cache in (a, b)])
    memory = None
    if a.memory_BND is not None and b.memory_BND is not None:
        memory = torch.cat([a.memory_BND, b.memory_BND])
    return _made(a.slots, kv, memory, documents, a.masked or b.masked)


def keep(cache: UndertowCache, rows: Sequence[int]) -> UndertowCache:
    """These rows alone, without the columns that are pads in all of them."""
    at = torch.tensor(rows, device=cache.layers[0].keys.device)
    documents = _documents(cache)[at]
    pads = int((documents == 0).all(0).sum())
    kv = [tuple(t[at, :, pads:] for t in (layer.keys, layer.values)) for layer in cache.layers]
    memory = None if cache.memory_BND is None else cache.memory_BND[at]
    return _made(cache.slots, kv, memory, documents[:, pads:], cache.masked)


def write(model, form: TextFormat, prompt: Tokens, how: Sampling, most: int, ends: Collection[int]) -> Iterator[str]:
    """The text after one prompt, piece by piece: at most `most` tokens, or up to one of the tokens `ends`."""
    text, generator, mixed = Text(form.tokenizer), how.generator(), form.memory != "none"
    logits, cache = prefill(model, [prompt.ids], None if form.memory == "all" else [prompt.memory])
    stepper = Stepper(model, cache, torch.tensor([[len(prompt)]], device=model.device), most) if mixed else None
    for n in range(1, most + 1):
        token = choose(logits[0], how, generator)
        if token in ends:
            break
        if piece := text.add(token):
            yield piece
        if n < most and stepper is None:  # the stepper always mixes
            logits = step(model, [token], cache, memory=False)
        elif n < most and stepper is not None:
            with torch.inference_mode():
                logits = stepper(torch.tensor([[token]], device=model.device))
    if piece := text.end():
        yield piece


def ends_of(model, tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's own and those of the model's generation settings."""
    chosen = model.generation_config.eos_token_id
    of_model = chosen if isinstance(chosen, list) else [chosen]
    return frozenset(token for token in (tokenizer.eos_token_id, *of_model) if token is not None)


def longest(model) -> int:
    """How many tokens a text may have, prompt included: the positions of the model's backbone."""
    return model.config.get_text_config().max_position_embeddings


def _documents(cache: UndertowCache) -> Tensor:
    if cache.documents_BT is not None:
        return cache.documents_BT
    k = cache.layers[0].keys
    return torch.ones(len(k), cache.length, dtype=torch.long, device=k.device)


def _made(slots, kv, memory: Tensor | None, documents: Tensor, masked: bool) -> UndertowCache:
    cache = UndertowCache(slots)
    cache.masked = masked
    for layer, (k, v) in zip(cache.layers, kv, strict=True):
        layer.set(k, v)
    padded = bool((documents == 0).any())
    cache.memory_BND, cache.documents_BT, cache.length = memory, documents if padded else None, documents.shape[1]
    return cache
