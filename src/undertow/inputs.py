"""From what a caller passes to what the executor runs: shapes checked, positions, documents and pads worked out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from undertow.backbone import Backbone
from undertow.cache import UndertowCache
from undertow.edges import Program
from undertow.frames import Sequence
from undertow.masks import Masks
from undertow.methods.base import Parts


def sequence(
    view: Backbone,
    program: Program,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    memory_mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    cache: UndertowCache | None = None,
) -> tuple[Sequence, Tensor | None]:
    """Everything that stays the same during the sweeps, and the document of every position so far, `_BK` (or None).

    Arguments as those of `UndertowForCausalLM.forward`. Raises ValueError for shapes that do not fit each other.
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    (B, T), device = given.shape[:2], given.device
    past = 0 if cache is None else cache.length
    for name, x in (("memory_mask", memory_mask), ("prefix_mask", prefix_mask)):
        if x is not None and tuple(x.shape) != (B, T):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {(B, T)}, that of the input")
    if prefix_mask is not None and program.causal:
        raise ValueError("prefix_mask: no part of this model reads a prefix in both directions")
    if prefix_mask is not None and past:
        raise ValueError("prefix_mask: a prefix is computed in one call, before anything is cached")
    if cache is not None and cache.slots != program.slots:
        raise ValueError("past_key_values was made with another loop count: decode with the one of the prefill")
    if attention_mask is not None and tuple(attention_mask.shape) != (B, past + T):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: must be {(B, past + T)}, "
            f"{past} cached and {T} new positions, 0 at pads"
        )
    table = getattr(view.base, view.family.positions) if view.family.positions else None
    if isinstance(table, nn.Embedding) and past + T > table.num_embeddings:
        raise ValueError(f"{past + T} positions: the backbone's learned position table has {table.num_embeddings}")
    packed = position_ids is not None
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
    elif position_ids is None:
        position_ids = torch.arange(past, past + T, device=device)[None]
    if position_ids.shape[-1] != T or position_ids.shape[0] not in (1, B):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: must be {(B, T)}")
    documents_BK, real_BT, inside_BT = _documents(attention_mask, position_ids if packed else None, B, T, cache)
    x_BTD = view.embed(input_ids, inputs_embeds, position_ids)
    entry = None if cache is None else cache.memory_BND
    begins = entry is None
    if entry is None:
        entry = x_BTD.new_zeros(B, len(program.memories), x_BTD.shape[-1])
    seq = Sequence(
        x_BTD=x_BTD,
        context=view.context(input_ids, x_BTD, position_ids, past),
        masks=Masks(T, past, documents_BK, device, None if prefix_mask is None else prefix_mask.bool()),
        past={} if cache is None else cache.past(),
        entry_BND=entry,
        real_BT=real_BT,
        inside_BT=inside_BT,
        memory_mask_BT=None if memory_mask is None else memory_mask.bool(),
        begins=begins,
    )
    return seq, documents_BK


def _documents(attention_mask, position_ids, B: int, T: int, cache: UndertowCache | None):
    """`(document_BK, real_BT, inside_BT)`; each None where it would say nothing (one document, no pads).

    `position_ids` are those the caller gave (None: derived, so only pads matter). Documents are numbered from 1 along
    each row, 0 is a pad; `inside` is False where a document starts.
    """
    past = 0 if cache is None else cache.length
    known = None if cache is None else cache.documents_BT
    mask_BT = None if attention_mask is None else attention_mask[:, -T:].bool()
    padded = mask_BT is not None and not bool(mask_BT.all())
    starts = position_ids is not None and bool((position_ids[:, 0 if past else 1 :] == 0).any())
    if known is None and past and attention_mask is not None and not bool(attention_mask[:, :past].all()):
        raise ValueError("attention_mask has pads among cached positions that were not pads when they were computed")
    if known is None and not padded and not starts:
        return None, None, None
    device = (attention_mask if attention_mask is not None else position_ids).device
    real_BT = torch.ones(B, T, dtype=torch.bool, device=device) if mask_BT is None else mask_BT
    if known is None:
        known = torch.ones(B, past, dtype=torch.long, device=device)
    newest_B1 = known.amax(1, keepdim=True) if past else torch.zeros(B, 1, dtype=torch.long, device=device)
    start_BT = torch.zeros_like(real_BT) if position_ids is None else (position_ids == 0) & real_BT
    start_BT = start_BT | (real_BT & (real_BT.cumsum(1) == 1) & (newest_B1 == 0))  # the first real token of a row
    document_BT = torch.where(real_BT, newest_B1 + start_BT.cumsum(1), 0)
    return torch.cat([known, document_BT], 1), real_BT if padded else None, ~start_BT


def memory_mask_for(
    time: Parts, input_ids: Tensor | None, new_BT: Tensor, given: Tensor | None = None, masked: bool = False
) -> Tensor | None:
    """Where delay-1 targets are mixed at new tokens, `_BT` (None: everywhere): the one place that knows the default.

    As far as a caller's mask reaches it decides; beyond it, and where there is none, the method does.

    Args:
        time: the parts of the method over time.
        input_ids: of the new tokens, `_BT` (None: only their embeddings are known, so none is the method's mark).
        new_BT: any tensor of the new tokens' shape and device (further dimensions are not read).
        given: the caller's mask from the first new token on, `_BT` or shorter.
        masked: a caller's mask covered what came before.
    """
    B, T = new_BT.shape[:2]
    if given is not None and given.shape[1] >= T:
        return given
    if time.mark is not None:
        none = torch.zeros(B, T, dtype=torch.bool, device=new_BT.device)
        own = none if input_ids is None else input_ids == time.mark
    elif given is None and (time.beyond or not masked):
        return None
    else:
        own = torch.full((B, T), time.beyond, device=new_BT.device)
    return own if given is None else torch.cat([given.bool(), own[:, given.shape[1] :]], 1)


def checked_labels(labels: Tensor | None, shape: torch.Size, prefix_mask: Tensor | None) -> Tensor | None:
    """The labels, which must have the input's shape and must not ask for what a prefix already shows."""
    if labels is None:
        return None
    if labels.shape != shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: must be {tuple(shape)}, that of the input")
    if prefix_mask is not None and bool(((labels != -100) & prefix_mask.bool())[:, 1:].any()):
        raise ValueError(
            "labels inside the prefix: tokens read in both directions cannot be predicted; set them to -100"
        )
    return labels
