"""Tokens per second."""

from __future__ import annotations

import time

import torch


@torch.no_grad()
def generation_speed(model, prompt_ids: torch.Tensor, new_tokens: int = 64, repeats: int = 2) -> float:
    """New tokens per second of greedy, cached generation from one prompt, prefill included; the best of `repeats`.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        prompt_ids: token ids, `_T` or `_BT`; with a batch, the tokens of all rows count.
    """
    ids_BT = prompt_ids.reshape(-1, prompt_ids.shape[-1]).long().to(model.device)
    keywords = {"attention_mask": torch.ones_like(ids_BT), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(input_ids=ids_BT, max_new_tokens=2, **keywords)  # warm up
    best = float("inf")
    for _ in range(repeats):
        _wait(model.device)
        began = time.perf_counter()
        model.generate(input_ids=ids_BT, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **keywords)
        _wait(model.device)
        best = min(best, time.perf_counter() - began)
    return ids_BT.shape[0] * new_tokens / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
