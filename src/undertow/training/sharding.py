"""FSDP2: a model's weights, gradients and optimiser states cut over processes, and checkpoints that fit any number.

`torch.distributed.fsdp.fully_shard` on every layer and extra block, then on the rest. A layer's weights are gathered
each time it is called and let go after: sweeps and loops gather them again, which `analysis.cluster` counts. So give
`reshard_after_forward=False` to keep them for all sweeps of a step, where there is room for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from undertow.model import UndertowForCausalLM

__all__ = ["load_sharded", "save_sharded", "shard"]


def shard(model: UndertowForCausalLM, mesh=None, **how) -> UndertowForCausalLM:
    """Cut a model over the processes of `mesh` (None: all), in place; call it before the optimiser is made.

    Args:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.
        how: what else `fully_shard` takes, e.g. `mp_policy` or `reshard_after_forward`.

    Raises:
        RuntimeError: no process group was initialised.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError("shard: no process group; start with torchrun and torch.distributed.init_process_group()")
    blocks = {step.block for step in model.program.steps if isinstance(step.block, str)} & set(model.undertow)
    for unit in (*model.view.layers, *(model.undertow[name] for name in sorted(blocks))):
        fully_shard(unit, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)
    return model


def save_sharded(folder: str | Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Each process writes its part of weights and optimiser states into `folder` (torch's distributed checkpoint)."""
    weights, states = get_state_dict(model, optimiser)
    dcp.save({"model": weights, "optimiser": states}, checkpoint_id=str(folder))


def load_sharded(folder: str | Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Read what `save_sharded` wrote, with whatever number of processes, sharded or not."""
    weights, states = get_state_dict(model, optimiser)
    held: dict[str, Any] = {"model": weights, "optimiser": states}
    dcp.load(held, checkpoint_id=str(folder))
    set_state_dict(model, optimiser, model_state_dict=held["model"], optim_state_dict=held["optimiser"])
