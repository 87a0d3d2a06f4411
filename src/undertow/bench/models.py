"""The models and texts of the benchmark's rows, at the sizes of the published measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from undertow.methods.base import Method
from undertow.model import UndertowForCausalLM, from_scratch
from undertow.schedules import Schedule


@dataclass(frozen=True)
class Size:
    """Sizes of one row: the model, `batch` rows of `tokens`, and for some the new tokens and the steps of training."""

    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int
    new: int = 0
    steps: int = 0

    def tiny(self) -> Size:
        """The same row small enough for a test of whether it runs."""
        small = dict(width=32, mlp=48, heads=2, vocabulary=300, batch=min(self.batch, 2), tokens=min(self.tokens, 10))
        return replace(self, **small, layers=min(self.layers, 6), new=min(self.new, 2), steps=min(self.steps, 1))


def llama(size: Size, **fields):
    """Hugging Face's own Llama config of this size, untied."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=2048,
        **fields,
    )
    config.bos_token_id = config.eos_token_id = None
    return config


def gpt2(size: Size):
    """A GPT-2 config of this size without dropout (published: the baseline of GPTTRM)."""
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=size.width, n_inner=size.mlp, n_layer=size.layers, n_head=size.heads, vocab_size=size.vocabulary,
        n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def nanochat(size: Size):
    """LRT's backbone of this size, a value table in every layer."""
    from undertow.backbone import UndertowNanoChatConfig

    return UndertowNanoChatConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.tokens,
        value="every",
    )


def plain(config) -> nn.Module:
    """The backbone as Hugging Face runs it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def recurrent(config, depth: dict | None = None, time: dict | None = None) -> UndertowForCausalLM:
    """A model of methods given as recipes name them, `{"method": name, **fields}`; neither: the backbone alone."""
    torch.manual_seed(0)
    return from_scratch(
        config,
        depth=None if depth is None else Method.from_dict(depth, "depth"),
        time=None if time is None else Method.from_dict(time, "time"),
    )


def ids(size: Size, length: int | None = None) -> Tensor:
    """Random tokens, `batch` rows of `length` (None: of the row's own)."""
    shape = (size.batch, size.tokens if length is None else length)
    return torch.randint(3, size.vocabulary, shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- trained weights


@lru_cache(maxsize=1)
def text() -> Tensor:
    """A megabyte of the standard library, bytes as tokens."""
    from undertow.data.corpus import load_corpus

    joined = "\n".join(document.text for document in load_corpus().train[:200])
    return torch.tensor(list(joined.encode()[: 1 << 20]))


def batch(size: Size, generator: torch.Generator) -> Tensor:
    data = text()
    starts = torch.randint(len(data) - size.tokens, (size.batch,), generator=generator)
    return torch.stack([data[s : s + size.tokens] for s in starts])


def trained(make: Callable[[], UndertowForCausalLM], size: Size, schedule: Schedule, gates: float | None = None):
    """A model after `size.steps` steps on bytes of text, and a batch it has not seen: `(model, ids_BT)`.

    `gates`: where the gammas of the memory's gates start (None: where the method has them), since a short training
    leaves closed ones all but closed. At 30 times the learning rate they did not open either, and the model diverged.
    """
    model, generator = make().train(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if gates is not None and name.endswith("scale_m"):
            nn.init.constant_(parameter, gates)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(size.steps):
        x = batch(size, generator)
        optimiser.zero_grad()
        model(x, labels=x, schedule=schedule).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.zero_grad()
    return model, batch(size, generator)


# ---------------------------------------------------------------------- fidelity


def memory_error(model: UndertowForCausalLM, x: Tensor, schedule: Schedule, true: Tensor) -> float:
    """Relative distance of the memory that a schedule computes to the true one."""
    with torch.no_grad():
        found = model(x, schedule=schedule).memory
    return float((found - true).norm() / true.norm())


def gradients(model: UndertowForCausalLM, x: Tensor, schedule: Schedule) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, labels=x, schedule=schedule).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradient_error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the true gradient, all parameters together."""
    off = sum(float((found[name] - g).square().sum()) for name, g in true.items())
    return (off / sum(float(g.square().sum()) for g in true.values())) ** 0.5
