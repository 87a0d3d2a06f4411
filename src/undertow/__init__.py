"""undertow: recurrent transformers on any Hugging Face causal language model.

Two kinds of recurrence, in one small vocabulary: layers *reused over depth* (same token, same weights again) and a
latent state *carried over time* (from token t-1 to token t). A method is a plan, some edges and a default schedule.

Tensor names carry their dimensions, in this legend (used in every file):

    B batch    T positions    S positions of a subset    D width    N memories (one per delay-1 source)
    H query heads    G key/value heads    E head width    V vocabulary

Importing it registers our models with Hugging Face's Auto classes: `AutoModelForCausalLM.from_pretrained` loads them.
"""

from __future__ import annotations

from undertow.backbone.llama import UndertowLlamaConfig, UndertowLlamaForCausalLM
from undertow.backbone.nanochat import UndertowNanoChatConfig, UndertowNanoChatForCausalLM
from undertow.data.format import TextFormat
from undertow.exits import Exit
from undertow.methods import LRT, METHODS, T2MLR, BlockLoop, Coconut, Method, MiddleLoop, Parts, ReuseMap, TRMBlock
from undertow.model import UndertowConfig, UndertowForCausalLM, UndertowOutput, from_scratch, wrap
from undertow.schedules import SCHEDULES, Chunked, Converge, Cyclic, Interleaved, Jacobi, Schedule, Sequential

__version__ = "0.1.0"

__all__ = [
    "BlockLoop",
    "Chunked",
    "Coconut",
    "Converge",
    "Cyclic",
    "Exit",
    "Interleaved",
    "Jacobi",
    "LRT",
    "METHODS",
    "Method",
    "MiddleLoop",
    "Parts",
    "ReuseMap",
    "SCHEDULES",
    "Schedule",
    "Sequential",
    "T2MLR",
    "TRMBlock",
    "TextFormat",
    "UndertowConfig",
    "UndertowForCausalLM",
    "UndertowLlamaConfig",
    "UndertowLlamaForCausalLM",
    "UndertowNanoChatConfig",
    "UndertowNanoChatForCausalLM",
    "UndertowOutput",
    "from_scratch",
    "wrap",
    "__version__",
]
