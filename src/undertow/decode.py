"""The decode loop: one token after another, with as little between the layers as there can be.

`generate()` comes here for greedy search and sampling; whatever this loop does not do (`why_not` says what and why)
goes through Hugging Face's own. Tokens are the same. Made once, not once a token: room for keys and values
(written in place, grown by doubling), masks, rotary tables, and what the plan asks of every visit.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import EosTokenCriteria, GenerationMixin, MaxLengthCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from undertow.cache import UndertowCache
from undertow.stepper import Stepper, compiling
from undertow.versions import CACHE

COLDEST = 1e-30  # a temperature below it is none: only the likeliest token is left, and logits divided by it overflow

__all__ = ["decode", "lean", "why_not"]

logger = logging.getLogger(__name__)


def why_not(
    model, generation_config, model_kwargs: Mapping, synced_gpus: bool = False, prompt: int | None = None
) -> str | None:
    """Why Hugging Face's own loop decodes here and not this one (None: this one does). `prompt`: its length."""
    from undertow.model import UndertowForCausalLM

    mode = generation_config.get_generation_mode()
    cache, mask = model_kwargs.get(CACHE), model_kwargs.get("memory_mask")
    reasons = (
        (not isinstance(model, UndertowForCausalLM), f"{type(model).__name__} is not ours: undertow.wrap(model) is"),
        (mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE), f"{mode.value} is Hugging Face's"),
        (generation_config.is_assistant, "the model is an assistant"),
        (not isinstance(cache, UndertowCache) or not model_kwargs.get("use_cache", True), "use_cache=False"),
        (getattr(cache, "recording", False), "the cache records what it may be cut back to"),
        (model_kwargs.get("exit_rule") is not None, "exit_rule: tokens leave the loop one by one"),
        (model.training, "the model is in training mode"),
        ("prepare_inputs_for_generation" in vars(model), "its inputs are prepared by somebody else (prompt tuning)"),
        (synced_gpus, "synced_gpus=True"),
        (generation_config.output_attentions or generation_config.output_hidden_states, "attentions or hidden states"),
        (mask is not None and prompt is not None and mask.shape[1] > prompt, "memory_mask covers more than the prompt"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def lean(
    model,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus: bool = False,
    streamer=None,
    compiled: bool = False,
    **model_kwargs,
):
    """Greedy search or sampling, as `model.generate(..., custom_generate=lean)`. Results are Hugging Face's own.

    `generate()` of our models comes here by itself. Asked for by name, it warns where it cannot do what was asked, and
    takes `compiled=True`: layers through `torch.compile`. (Hugging Face hands no `streamer` to a function given by
    name; `functools.partial(lean, streamer=streamer)` does.)

    Returns:
        Tokens `_BT`, prompt included, or a `GenerateDecoderOnlyOutput`, as `generation_config` says.
    """
    why = why_not(model, generation_config, model_kwargs, synced_gpus, input_ids.shape[1])
    if why is not None:
        warnings.warn(f"decoded by Hugging Face's own loop: {why}", stacklevel=3)
    return decode(
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, compiled,
        **model_kwargs,
    )  # fmt: skip


def decode(
    model, input_ids: Tensor, logits_processor, stopping_criteria, generation_config, synced_gpus: bool = False,
    streamer=None, compiled: bool = False, **model_kwargs,
):  # fmt: skip
    """As `lean` (`input_ids` are `_BT`), and silent but for the log where Hugging Face's loop does it."""
    why = why_not(model, generation_config, model_kwargs, synced_gpus, input_ids.shape[1])
    if why is not None:
        logger.info("decoded by Hugging Face's own loop: %s", why)
        mode = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
        method = getattr(GenerationMixin if mode == "_sample" else type(model), mode)
        streams = {} if streamer is None else {"streamer": streamer}
        given = dict(logits_processor=logits_processor, stopping_criteria=stopping_criteria)
        given |= dict(generation_config=generation_config, synced_gpus=synced_gpus)
        return method(model, input_ids, **given, **streams, **model_kwargs)

    first = model._prefill(input_ids, generation_config, model_kwargs)
    chooser = _Chooser(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    stepper = Stepper(
        model,
        first.past_key_values,
        _next_position(input_ids, first.past_key_values, model_kwargs),
        most=chooser.most,
        loops=model_kwargs.get("loops"),
        compiled=compiled,
    )
    logits_BV = first.logits[:, -1]
    del first
    with torch.inference_mode(), compiling(compiled):
        while not chooser.take(logits_BV):
            logits_BV = stepper(chooser.newest_B1)
    if streamer is not None:
        streamer.end()
    return chooser.result(stepper.release())


def _next_position(input_ids: Tensor, cache: UndertowCache, model_kwargs: Mapping) -> Tensor:
    """The position of the token after the prompt, `_B1`."""
    given = model_kwargs.get("position_ids")
    if given is not None:
        return given[:, -1:] + 1
    return torch.full((len(input_ids), 1), cache.length, device=input_ids.device)


class _Chooser:
    """The tokens so far; takes logits, chooses the next ones as Hugging Face does, and says when all rows are done."""

    def __init__(self, input_ids: Tensor, processors, criteria, config, streamer):
        (B, self.length), device = input_ids.shape, input_ids.device
        self.config, self.processors, self.streamer = config, processors, streamer
        ends = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        self.ends = frozenset(torch.cat([e.flatten() for e in ends]).tolist()) if ends else frozenset()
        self.most = max(1, config.max_length - self.length)
        self.criteria = [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
        self.tokens = torch.empty(B, self.length + self.most, dtype=input_ids.dtype, device=device)
        self.tokens[:, : self.length] = input_ids
        self.done = [False] * B
        self.done_B: Tensor | None = None  # the same as a tensor, as soon as a row is done
        self.newest_B1 = self.tokens[:, :0]
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def take(self, logits_BV: Tensor) -> bool:
        """Choose one token a row; True when nothing is left to do."""
        config, n = self.config, self.length
        logits_BV = logits_BV.float()
        if config.return_dict_in_generate and config.output_logits:
            self.logits.append(logits_BV.clone())
        scores_BV = self.processors(self.tokens[:, :n], logits_BV) if self.processors else logits_BV
        if config.return_dict_in_generate and config.output_scores:
            self.scores.append(scores_BV)
        if config.do_sample:
            new_B = torch.multinomial(scores_BV.softmax(-1), 1).squeeze(1)
        else:
            new_B = scores_BV.argmax(-1)
        if self.done_B is not None and self.ends:
            new_B = torch.where(self.done_B, config._pad_token_tensor.to(new_B.device), new_B)
        self.newest_B1 = new_B[:, None]
        self.tokens[:, n : n + 1] = self.newest_B1
        self.length = n + 1
        if self.streamer is not None:
            self.streamer.put(new_B.cpu())
        return self._finished(new_B)

    def _finished(self, new_B: Tensor) -> bool:
        found = list(self.done)
        if self.ends:
            found = [d or token in self.ends for d, token in zip(found, new_B.tolist(), strict=True)]
        for criterion in self.criteria:
            scores = tuple(self.scores) if self.scores else None
            said = criterion(self.tokens[:, : self.length], scores)
            said = said.tolist() if isinstance(said, Tensor) else [said] * len(found)
            found = [d or bool(s) for d, s in zip(found, said, strict=True)]
        if found != self.done:
            self.done, self.done_B = found, torch.tensor(found, device=new_B.device)
        return all(found) or self.length == self.tokens.shape[1]

    def result(self, cache: UndertowCache):
        # Tensors made in inference mode must not get out (hence the clones): nobody could train on them.
        tokens, config = self.tokens[:, : self.length].contiguous(), self.config
        if not config.return_dict_in_generate:
            return tokens
        scores = tuple(x.clone() for x in self.scores) if config.output_scores else None
        logits = tuple(x.clone() for x in self.logits) if config.output_logits else None
        more: dict = {"scores": scores, "logits": logits, CACHE: cache}  # typed too narrowly over there
        return GenerateDecoderOnlyOutput(sequences=cast(LongTensor, tokens), **more)
