"""What Hugging Face's `generate()` asks of a model: the cache that also holds the memory, masks, our own loop."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin

from undertow.cache import UndertowCache
from undertow.inputs import memory_mask_for
from undertow.methods.base import Parts
from undertow.versions import CACHE

__all__ = ["Generating"]

OURS = ("memory_mask", "prefix_mask", "schedule", "loops", "exit_rule")  # keywords of `forward` that no other model has


class Generating(GenerationMixin):
    """Generation, through Hugging Face's own `generate()`."""

    time_parts: Parts

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r}: the cache also holds the memory; allowed are None and 'dynamic'"
            )
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = UndertowCache(self.program_for(model_kwargs.get("loops")).slots)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()  # its tokens may be refused

    def _sample(self, *args, **kwargs):
        """Greedy search and sampling: our own loop where it can (`undertow.decode.why_not`), else Hugging Face's."""
        from undertow.decode import decode

        return decode(self, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        """As Hugging Face; an assistant that is not ours is not asked for what only ours takes."""
        if assistant_model is not None and not isinstance(assistant_model, Generating):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OURS}
        return super()._get_candidate_generator(  # type: ignore[misc]
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def prepare_inputs_for_generation(  # type: ignore[override]  # the others are among the keywords
        self, input_ids, inputs_embeds=None, memory_mask: Tensor | None = None, prefix_mask=None, **kwargs
    ):
        """As Hugging Face. Both masks cover the prompt; of later tokens none is prefix, and see `memory_mask_for`."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]
        cache = inputs.get(CACHE)
        past = 0 if cache is None else cache.length
        if prefix_mask is not None and past == 0:
            inputs["prefix_mask"] = F.pad(prefix_mask, (0, inputs["input_ids"].shape[1] - prefix_mask.shape[1]))
        if memory_mask is not None:
            new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            given = memory_mask[:, past : past + new.shape[1]]
            inputs["memory_mask"] = memory_mask_for(self.time_parts, inputs.get("input_ids"), new, given)
        return inputs
