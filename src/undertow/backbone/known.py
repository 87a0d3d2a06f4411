"""Configs of the pretrained models that our recipes name, so that they can be shown and counted without the hub."""

from __future__ import annotations

from typing import Any

_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _sizes(model_type: str, vocab_size: int, positions: int, *sizes: int) -> dict[str, Any]:
    shape = dict(zip(_FIELDS, sizes, strict=True))
    whole = {"vocab_size": vocab_size, "max_position_embeddings": positions, "tie_word_embeddings": True}
    return {"model_type": model_type} | shape | whole


KNOWN = {  # as the hub has them
    "HuggingFaceTB/SmolLM2-135M": _sizes("llama", 49152, 8192, 576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _sizes("llama", 49152, 8192, 576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M": _sizes("llama", 49152, 8192, 960, 2560, 32, 15, 5),
    "Qwen/Qwen2.5-0.5B": _sizes("qwen2", 151936, 32768, 896, 4864, 24, 14, 2),
    "meta-llama/Llama-3.2-1B-Instruct": _sizes("llama", 128256, 131072, 2048, 8192, 16, 32, 8),
}
