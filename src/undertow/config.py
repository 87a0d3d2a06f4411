"""What is saved beside the weights: the backbone's config and the methods on it."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from undertow.methods.base import Method


class UndertowConfig(PreTrainedConfig):
    """A backbone's config and the methods on it. The schedule is a run-time choice and not part of it.

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
        "sweep_losses",
        "memory",
        "residual",
        "passes",
        "rounds",
        "last_hidden_state",
    ]

    backbone: dict | PreTrainedConfig | None = None
    depth: dict | None = None
    time: dict | None = None
    future: dict | None = None
    retrofit: bool = False

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone, dict):
            self.backbone = AutoConfig.for_model(**self.backbone)
        if self.backbone is not None:  # Hugging Face hands the outer choice of attention down to the backbone
            kwargs.setdefault("attn_implementation", self.backbone._attn_implementation)
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """Sizes of the language model (what Hugging Face tools read): the backbone's config."""
        return self.backbone if isinstance(self.backbone, PreTrainedConfig) else self

    def methods(self) -> tuple[Method | None, Method | None]:
        """The depth and the time method. Raises ValueError for unknown ones."""
        return (
            None if self.depth is None else Method.from_dict(self.depth, "depth"),
            None if self.time is None else Method.from_dict(self.time, "time"),
        )
