"""Text from a trained model, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import TextStreamer

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
        new_tokens: at most this many.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among this many likeliest tokens; 0: all.
        seed: of the sampling; the global generator is left as it was.
        write: called with each piece of text as it is finished.
        compiled: run the layers through `torch.compile`: a minute or so before the first token, less for each.

    Raises:
        ValueError: the prompt has no token, or `new_tokens` is below 1.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.numel() == 0:
        raise ValueError("prompt: must hold at least one token")
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: must be at least 1")
    warm = temperature >= COLDEST
    choice = {"do_sample": True, "temperature": temperature, "top_k": top_k} if warm else {"do_sample": False}
    ids, streamer = ids.long().to(model.device), None if write is None else _Pieces(tokenizer, write)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            streamer=streamer,
            custom_generate=partial(lean, streamer=streamer, compiled=True) if compiled else None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **choice,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
