"""Tensors laid where no allocator lays them: what is computed must not hang on where a tensor lies.

A product's last digit may depend on the alignment of its operands, and a file maps its tensors at any multiple of eight
bytes. With UNDERTOW_RELAY=1 in the environment every loaded tensor lies one to seven elements into its storage, each at
another offset, and every parameter that is built lies one element in: the same wherever it is built, so that a run that
is resumed may still be held to the bits of the one that was not stopped.
"""

import functools
import itertools
import sys

import safetensors.torch
import torch
from transformers import PreTrainedModel

_offsets = itertools.cycle(range(1, 8))


def laid(x, offset: int):
    """`x`'s values, `offset` elements into a storage of their own; what is no plain CPU tensor of floats, as it is."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.is_floating_point()
    if not plain or x.device.type != "cpu" or not x.is_contiguous() or not x.numel():
        return x
    storage = torch.empty(x.numel() + offset, dtype=x.dtype)
    return storage[offset:].view(x.shape).copy_(x.detach())


def built(x):
    """One element in, unless it lies at an odd place already: what shares a storage goes on sharing it.

    Sharded parameters are written through storages of their own, which a copy would no longer see: they stay.
    """
    if torch.distributed.is_initialized():
        return x
    aligned = isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.data_ptr() % 64 == 0
    return laid(x, 1) if aligned and not x.requires_grad else x


def loaded(found):
    """Every tensor of a nest of dicts and lists at the next offset."""
    if isinstance(found, dict):
        for key, value in found.items():
            found[key] = loaded(value)
        return found
    if isinstance(found, (list, tuple)):
        return type(found)(map(loaded, found)) if type(found) in (list, tuple) else found
    return laid(found, next(_offsets)) if isinstance(found, torch.Tensor) else found


def read(model: torch.nn.Module) -> None:
    """Every parameter and buffer of a model at the next offset; what is tied stays tied."""
    for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values():
        x.data = loaded(x.data)


def install() -> None:
    """From here on, in this process."""
    torch.load = _then(torch.load, loaded)
    for name in ("load_file", "load"):
        before = getattr(safetensors.torch, name)
        after = _then(before, loaded)
        for module in list(sys.modules.values()):  # and where it was imported by name
            if getattr(module, "__dict__", {}).get(name) is before:
                setattr(module, name, after)
    PreTrainedModel.from_pretrained = classmethod(_read_by(PreTrainedModel.from_pretrained.__func__))
    torch.nn.Parameter.__new__ = _parameter(torch.nn.Parameter.__new__)
    torch.nn.Module._apply = _applied(torch.nn.Module._apply)


def _then(load, change):
    @functools.wraps(load)
    def inner(*args, **kwargs):
        return change(load(*args, **kwargs))

    return inner


def _read_by(load):
    @functools.wraps(load)
    def inner(cls, *args, **kwargs):
        found = load(cls, *args, **kwargs)
        read(found[0] if isinstance(found, tuple) else found)
        return found

    return inner


def _parameter(new):
    @functools.wraps(new)
    def inner(cls, data=None, requires_grad=True):
        return new(cls, built(data) if cls is torch.nn.Parameter else data, requires_grad)

    return inner


def _applied(apply):
    @functools.wraps(apply)
    def inner(self, fn, *args, **kwargs):
        def changed(x):
            made = fn(x)
            return x if made is x else built(made)  # what was not moved is still who it was

        return apply(self, changed, *args, **kwargs)

    return inner
