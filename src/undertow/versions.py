"""What the supported versions of transformers call differently: the cache, `past_key_values` before 5.24, then `cache`.

Our models take and return it under both names, whatever the version.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

NEW, OLD = "cache", "past_key_values"
CACHE = NEW if NEW in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """What was given under either name. Raises ValueError: under both."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one thing: give one of them")
    return cache if past_key_values is None else past_key_values


def cache_keyword(layer: Any, otherwise: str) -> str:
    """The keyword under which a layer takes its cache: `otherwise`, unless this version has renamed it."""
    parameters = inspect.signature(layer.forward).parameters
    return otherwise if otherwise in parameters or NEW not in parameters else NEW
