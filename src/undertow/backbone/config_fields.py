"""Which fields of a Hugging Face config a recipe may set: each under one name, and only those that something reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields that no part of a causal LM reads. A field that merely decides about others (`use_sliding_window`) is among
# them: it applies where it changes one of these.
UNREAD = frozenset(
    (
        *TOKENS,  # of a recipe's model they are the tokenizer's
        *("use_cache", "pretraining_tp", "is_decoder", "use_sliding_window", "max_window_layers"),
        *("classifier_dropout", "summary_type", "summary_use_proj", "summary_activation"),
        *("summary_proj_to_labels", "summary_first_dropout"),
    )
)


def allowed(cls: type[PreTrainedConfig]) -> list[str]:
    """The fields about the architecture and their other names, sorted."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return sorted({field.name for field in dataclasses.fields(cls)} - general | set(cls.attribute_map))


def twice(cls: type[PreTrainedConfig], values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Two names of one field that are both given (`hidden_size` and `n_embd` of GPT-2), or None."""
    return next(((a, b) for a, b in cls.attribute_map.items() if a in values and b in values), None)


def other_names(cls: type[PreTrainedConfig], name: str) -> set[str]:
    """Every other name of a field."""
    field = cls.attribute_map.get(name, name)
    return {field, *(alias for alias, of in cls.attribute_map.items() if of == field)} - {name}


def ignored(cls: type[PreTrainedConfig], values: Mapping[str, Any]) -> str | None:
    """A given field that changes nothing of the model though it differs from its default, or None.

    What a field changes is seen by leaving it out: the two configs must differ in something that is read.
    """
    config = cls(**values)
    whole, defaults = _read(config), {field.name: field.default for field in dataclasses.fields(cls)}
    own = getattr(cls, "conditional", {})  # our configs say which fields apply only with another's value
    for name, value in values.items():
        field = cls.attribute_map.get(name, name)
        if value != defaults.get(field) and field in own and not own[field](config):
            return name
        if value == defaults.get(field) or (field not in UNREAD and whole.get(field) == value):
            continue
        try:
            rest = _read(cls(**{other: held for other, held in values.items() if other != name}))
        except (ValueError, TypeError):  # without it the config is not even valid: it is read
            continue
        if rest == whole:
            return name
    return None


def _read(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in UNREAD}
