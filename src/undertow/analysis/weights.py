"""The matrices that a visit multiplies by: before attention, for keys, for values, and after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from undertow.backbone.positions import Cope
from undertow.model import UndertowForCausalLM
from undertow.plan import Block as Name

Weights = tuple[int, int]  # numbers in the matrices of some projections, and how many of them are trained


def projections(module: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear maps in a module, by name; GPT-2 writes them as `Conv1D`."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def weights_of(*modules: nn.Module) -> Weights:
    """Numbers in the matrices of the linear maps in some modules: all, and those that are trained."""
    matrices = [p.weight for module in modules for p in projections(module).values()]
    return sum(w.numel() for w in matrices), sum(w.numel() for w in matrices if w.requires_grad)


@dataclass(frozen=True)
class Block:
    """Projections before attention (keys' and values' apart, None where fused) and after it; widths of all heads.

    `table`: what attention multiplies its queries by beside the keys (CoPE; None elsewhere). `beside`: the MLP where it
    reads the layer's input, not the attention's output (GPT-NeoX's parallel residual); elsewhere part of `after`.
    """

    module: nn.Module
    before: Weights
    key: Weights | None
    value: Weights | None
    after: Weights
    width: int
    kv_width: int
    table: nn.Parameter | None = None
    beside: Weights = (0, 0)


def block_of(model: UndertowForCausalLM, name: Name) -> Block:
    """A layer is cut at its key and value projections; what follows is taken to read the attention's output
    (but for `beside`).

    An extra block is taken to attend with the backbone's width.
    """
    shape, family = model.view.shape, model.view.family
    if isinstance(name, str):
        block = model.undertow[name]
        return Block(block, weights_of(block), None, None, (0, 0), shape.width, shape.width)
    layer, width = model.view.layers[name], shape.heads * shape.head_width
    found, taps = projections(layer), (family.key, family.value)
    key, value = ([n for n in found if f"{n}.".startswith(f"{tap.module}.")] for tap in taps)  # adapters nest below
    names = list(found)
    end = 1 + max(names.index(n) for n in (*key, *value))  # projections are declared in the order of their use
    parallel = getattr(model.config.get_text_config(), "use_parallel_residual", False)  # a field of one family's config
    mlp = [n for n in names[end:] if parallel and n.startswith("mlp.")]
    before, beside = names[:end], weights_of(*(found[n] for n in mlp))
    after = weights_of(*(found[n] for n in names[end:] if n not in mlp))
    if family.key.parts > 1:
        fused = weights_of(*(found[n] for n in before))
        return Block(layer, fused, None, None, after, width, shape.kv_width, beside=beside)
    query, k, v = (weights_of(*(found[n] for n in part)) for part in ({*before} - {*key, *value}, key, value))
    table = next((m.table_EP for m in layer.modules() if isinstance(m, Cope)), None)
    return Block(layer, query, k, v, after, width, shape.kv_width, table, beside)
