"""undertow: recurrent transformers on any Hugging Face causal language model.

Two kinds of recurrence, in one small vocabulary: layers *reused over depth* (same token, same weights again) and a
latent state *carried over time* (from token t-1 to token t). A method is a plan, some edges and a default schedule.

Tensor names carry their dimensions, in this legend (used in every file):

    B batch    T positions    S positions of a subset    D width    N memories (one per delay-1 source)
    H query heads    G key/value heads    E head width    V vocabulary

Importing this package is cheap; torch and transformers load with the first name used.
"""

from __future__ import annotations

import importlib

from undertow._register import register

__version__ = "0.1.0"

_MODULES = ("schedules", "methods", "model", "exits", "data.format", "backbone.llama", "backbone.nanochat")


def __getattr__(name: str):
    """Public names are looked up in the modules that define them (lazily: `undertow --help` must not load torch)."""
    if name.startswith("_"):
        raise AttributeError(f"module 'undertow' has no attribute {name!r}")
    for module in _MODULES:
        found = importlib.import_module(f"{__name__}.{module}")
        if name in found.__all__:
            return getattr(found, name)
    raise AttributeError(f"module 'undertow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({"__version__", *(n for m in _MODULES for n in importlib.import_module(f"{__name__}.{m}").__all__)})


register()
