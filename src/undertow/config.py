"""What is saved beside the weights: the backbone's config and the methods on it."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from undertow.in_memory import folder_of
from undertow.methods.base import Method

# Fields of every config that say something of the model as a whole, not of its language model.
_OURS = {"architectures", "transformers_version"}
_SHARED = {field.name: field.default for field in fields(PreTrainedConfig) if field.name not in _OURS}


class UndertowConfig(PreTrainedConfig):
    """A backbone's config and the methods on it. The schedule is a run-time choice and not part of it.

    It answers for the backbone: every field of the backbone's config is read from it and written to it
    (`config.vocab_size`, `config.pad_token_id = 0`), under the family's own names too. Nothing is kept or saved twice;
    what all configs have (`dtype`, `return_dict`, `output_hidden_states`, ...) is the same in both.

    Args:
        backbone: config of the backbone (or its dict, with `model_type`).
        depth, time: methods as `{"method": name, **fields}`, or None.
        future: heads that predict tokens further ahead (fields of `undertow.future.FutureHeads`), or None.
        retrofit: whether mixers are built to start as the identity (`wrap`) or as published (`from_scratch`).
    """

    model_type = "undertow"
    sub_configs = {"backbone": AutoConfig}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",  # what the newest transformers calls it
        "sweep_losses",
        "memory",
        "residual",
        "passes",
        "future_losses",
        "rounds",
        "last_hidden_state",
    ]

    auto_map: ClassVar[dict[str, str]] = {}  # no code of the hub: who does not find the class uses the Auto classes

    backbone: dict | PreTrainedConfig | None = None
    depth: dict | None = None
    time: dict | None = None
    future: dict | None = None
    retrofit: bool = False

    def __post_init__(self, **kwargs):
        backbone, self.backbone = self.backbone, None  # Hugging Face's own setting up is not the backbone's
        if isinstance(backbone, dict):
            backbone = AutoConfig.for_model(**backbone)
        theirs: dict[str, Any] = {}
        if backbone is not None:
            kwargs.setdefault("attn_implementation", backbone._attn_implementation)
            kwargs.setdefault("output_attentions", backbone.output_attentions)
            for name, default in _SHARED.items():
                if getattr(self, name) == default:
                    setattr(self, name, getattr(backbone, name))
            theirs = {n: kwargs.pop(n) for n in list(kwargs) if not hasattr(type(self), n) and hasattr(backbone, n)}
        super().__post_init__(**kwargs)
        self.backbone = backbone
        if backbone is not None:
            self._attn_implementation = self._attn_implementation  # and the backbone's
        for name, value in theirs.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """What is not found here is asked of the backbone's config."""
        backbone = vars(self).get("backbone")  # not there yet while a copy or a pickle is being made
        if isinstance(backbone, PreTrainedConfig) and not name.startswith("_") and hasattr(backbone, name):
            return getattr(backbone, name)
        raise AttributeError(f"neither {type(self).__name__!r} nor its backbone's config has an attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        backbone = vars(self).get("backbone")
        if isinstance(backbone, PreTrainedConfig) and not name.startswith("_"):
            shared = name in _SHARED
            if shared or (not hasattr(type(self), name) and hasattr(backbone, name)):
                setattr(backbone, name, value)
                if not shared:
                    return
        super().__setattr__(name, value)

    @property
    def _name_or_path(self) -> str:  # type: ignore[override]  # a plain attribute over there
        """Where the model comes from; of one that lives in memory alone, see `undertow.in_memory`."""
        return vars(self).get("_name_or_path") or folder_of(self)

    @_name_or_path.setter
    def _name_or_path(self, value: str) -> None:
        vars(self)["_name_or_path"] = value

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """Sizes of the language model (what Hugging Face tools read): the backbone's config."""
        return self.backbone if isinstance(self.backbone, PreTrainedConfig) else self

    def to_dict(self) -> dict[str, Any]:
        """The fields, the backbone's under `backbone`. Asked by name, the dict answers for those too, as this does."""
        return _Answering(self._own(super().to_dict()))

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: no field of the backbone's beside those under `backbone`."""
        unnamed = copy.copy(
            self
        )  # no model's config: of one in memory the name would be a folder, made when it is read
        return self._own(super(UndertowConfig, unnamed).to_diff_dict())

    def _own(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in vars(self) or hasattr(type(self), name)}

    def methods(self) -> tuple[Method | None, Method | None]:
        """The depth and the time method. Raises ValueError for unknown ones."""
        return (
            None if self.depth is None else Method.from_dict(self.depth, "depth"),
            None if self.time is None else Method.from_dict(self.time, "time"),
        )


class _Answering(dict):
    """A config as a dict of its own fields that is also asked for the backbone's (peft asks dicts, not configs)."""

    @property
    def _backbone(self) -> dict:
        return dict.get(self, "backbone") or {}

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._backbone

    def __missing__(self, name: str) -> Any:
        if name == "backbone":
            raise KeyError(name)
        return self._backbone[name]

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default
