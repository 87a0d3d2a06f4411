"""Text from a trained model, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import TextStreamer

from undertow.data.format import TextFormat, pad_id
from undertow.decode import COLDEST, lean


class _Pieces(TextStreamer):
    """Hands every finished piece of text to a function (the parent prints it)."""

    def __init__(self, tokenizer, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text:
            self.write(text)


def sample(
    model,
    tokenizer,
    prompt: str,
    new_tokens: int = 48,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    write: Callable[[str], None] | None = None,
    compiled: bool = False,
) -> str:
    """Go on from `prompt`; returns the new text alone.

    Args:
        tokenizer: the model's `TextFormat`, or a tokenizer that carries one (else: see `TextFormat.of`): the prompt
            begins as texts did in training, and the memory acts where it did.
        new_tokens: at most this many.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among this many likeliest tokens; 0: all.
        seed: of the sampling; the global generator is left as it was.
        write: called with each piece of text as it is finished.
        compiled: run the layers through `torch.compile`: a minute or so before the first token, less for each.

    Raises:
        ValueError: the prompt has no token, or `new_tokens` is below 1.
    """
    form = TextFormat.of(tokenizer)
    tokenizer, given = form.tokenizer, form.begin(prompt)
    if not given.ids:
        raise ValueError("prompt: must hold at least one token")
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: must be at least 1")
    warm = temperature >= COLDEST
    choice = {"do_sample": True, "temperature": temperature, "top_k": top_k} if warm else {"do_sample": False}
    streamer = None if write is None else _Pieces(tokenizer, write)
    inputs = {name: x.to(model.device) for name, x in form.batch([given], new_tokens).items()}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            streamer=streamer,
            custom_generate=partial(lean, streamer=streamer, compiled=True) if compiled else None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id(tokenizer),
            **choice,
        )
    return tokenizer.decode(out[0, len(given) :], skip_special_tokens=True)
