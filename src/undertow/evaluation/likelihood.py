"""How likely the ends of texts are, in batches: what multiple-choice questions and perplexities are scored by."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from undertow.schedules import Schedule
from undertow.training.precision import autocast


@torch.no_grad()
def ends(
    model,
    texts: Sequence[tuple[Sequence[int], int]],
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
    memory: str = "all",
    show: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`(log_p_N, likeliest_N)` of the last N tokens of each text: log-probabilities, and which are the argmax.

    Texts are padded on the right and masked, so a text's scores are those it has alone. Texts that differ in their last
    token only (the letters of a multiple choice) are run once. No prefix is marked: every model here is causal.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        texts: `(tokens, N)`; at least one token stands before the last N. The last token is predicted but not read.
        schedule: None takes the model's default in evaluation, true decoding.
        batch_size: texts at a time.
        precision: `auto`, `float32` or `bfloat16`.
        memory: `all`, or `response`: only the last N tokens take in the memory of the token before them (T2MLR's
            second control flow, arXiv 2607.15178), as models of tasks are trained by default; or `none`.
        show: what to write beside a progress bar on stderr, if that is a terminal; None: no bar.

    Raises:
        ValueError: a text with nothing before its last N tokens.
    """
    same: dict[tuple, list[int]] = defaultdict(list)  # what is run, from where on its memory counts -> texts
    for i, (tokens, N) in enumerate(texts):
        if not 0 <= N < len(tokens):
            raise ValueError(f"text {i}: the last {N} of {len(tokens)} tokens: at least one must stand before them")
        same[tuple(tokens[:-1]), {"all": 0, "response": len(tokens) - N, "none": len(tokens)}[memory]].append(i)
    runs = sorted(same, key=lambda run: len(run[0]), reverse=True)  # the longest first: if memory is short, at once
    found: list = [None] * len(texts)
    for start in steps(range(0, len(runs), batch_size), show):
        batch = runs[start : start + batch_size]
        T = len(batch[0][0])
        first = min(len(inputs) - max(texts[i][1] for i in same[inputs, given]) for inputs, given in batch)
        keep = max(1, T - first)
        logits_BKV = _logits(model, batch, schedule, precision, keep)
        for (inputs, given), logits_KV in zip(batch, logits_BKV, strict=True):
            end = len(inputs) - T + keep
            for i in same[inputs, given]:
                tokens, N = texts[i]
                target_N = torch.tensor(tokens[len(tokens) - N :], device=logits_KV.device, dtype=torch.long)
                log_p_NV = logits_KV[end - N : end].log_softmax(-1)
                likeliest_N = log_p_NV.argmax(-1) == target_N
                found[i] = (log_p_NV.gather(1, target_N[:, None])[:, 0].cpu(), likeliest_N.cpu())
    return found


def _logits(model, batch: Sequence[tuple], schedule: Schedule | None, precision: str, keep: int) -> Tensor:
    """The last `keep` logits of texts padded on the right, in float32 or more."""
    ids_BT = pad_sequence([torch.tensor(inputs) for inputs, _ in batch], batch_first=True)
    position_T, length_B1 = torch.arange(ids_BT.shape[1]), torch.tensor([[len(inputs)] for inputs, _ in batch])
    masks = {"attention_mask": position_T < length_B1}
    if any(given for _, given in batch):
        masks["memory_mask"] = position_T >= torch.tensor([[given] for _, given in batch])
    masks = {name: mask_BT.long().to(model.device) for name, mask_BT in masks.items()}
    with autocast(precision, model.device):
        out = model(ids_BT.to(model.device), **masks, schedule=schedule, use_cache=False, logits_to_keep=keep)
    return out.logits.float() if out.logits.dtype in (torch.bfloat16, torch.float16) else out.logits


def steps(starts: range, show: str | None):
    """The starts of the batches, with a bar if one is asked for and seen."""
    if show is None:
        return starts
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    console = Console(stderr=True)
    return track(starts, escape(show), console=console, transient=True, disable=not console.is_terminal)


def fit(texts: Sequence[tuple[list[int], int]], room: int, what: str) -> list[tuple[list[int], int]]:
    """The texts cut from the left to what a model of `room` positions reads; a warning says how many were cut.

    Raises:
        ValueError: more tokens to score than positions.
    """
    longest = max((N for _, N in texts), default=0)
    if longest > room:
        raise ValueError(f"{what}: a text to score of {longest} tokens: must be at most {room} (positions)")
    say_cut(sum(len(tokens) > room + 1 for tokens, _ in texts), len(texts), room, what)
    return [(tokens[-(room + 1) :], N) for tokens, N in texts]  # the last token is predicted, but not read


def say_cut(cut: int, total: int, room: int, what: str) -> None:
    """Warn that the start of so many texts was left out."""
    if cut:
        warnings.warn(f"{what}: {cut} of {total} texts exceed {room} positions: they lose their start", stacklevel=3)


def positions(model) -> int:
    """The most tokens a model reads at once."""
    return model.config.get_text_config().max_position_embeddings
