"""Where training stands, whole or not there at all: a checkpoint takes its name when everything in it is written.

checkpoint-N/model/               the model as it would be kept now: loads with `TRM.load`
             training.safetensors parameters, average and the optimiser's moments
             carry-R.safetensors  the rows of process R: their state, steps and puzzles; what is not logged yet
             state.json           what the run was started with, and its step
             checksums.json       of all of these

There is no state of a random generator: every draw is a function of the seed and the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from undertow.agree import together
from undertow.training import checkpoints
from undertow.trm.ema import EMA
from undertow.trm.halting import Carry
from undertow.trm.model import TRM


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if together() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if together() else 1


def wait() -> None:
    """Until every process is here."""
    if together():
        dist.barrier()


def save(
    root: Path,
    step: int,
    model: TRM,
    optimiser: torch.optim.Optimizer,
    ema: EMA | None,
    carry: Carry,
    tally: Mapping[str, Tensor],
    seed: int,
    keep: int,
) -> None:
    """Write `checkpoint-STEP` below `root` and remove all but the newest `keep`. Every process calls it.

    Args:
        tally: sums of this process since the last log.

    Raises:
        OSError: the disk is full; older checkpoints stay whole.
    """
    done = root / f"checkpoint-{step}"
    with checkpoints.full_disk_said(root):
        if rank() == 0:
            checkpoints.begin(done)
        wait()
        part = root / checkpoints.PART / done.name
        save_file(_plain(carry) | _named("tally", tally), part / f"carry-{rank()}.safetensors")
        if rank() == 0:
            tensors = _named("model", model.state_dict()) | _moments(optimiser)
            save_file(tensors | _named("ema", ema.average if ema else {}), part / "training.safetensors")
            (model if ema is None else ema.averaged(model)).save(part / "model")
            (part / "state.json").write_text(json.dumps(_started(model, ema, seed) | {"step": step}), encoding="utf-8")
        wait()
        if rank() == 0:
            checkpoints.finish(done)
            checkpoints.rotate(root, step, keep)


def restore(
    folder: Path, model: TRM, optimiser: torch.optim.Optimizer, ema: EMA | None, seed: int
) -> tuple[int, Carry, dict[str, Tensor]]:
    """Load a checkpoint into model, optimiser and average; `(step, carry, tally)`.

    Raises:
        ValueError: it is of another network, another seed, or another number of processes.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, here in _started(model, ema, seed).items():
        if state[name] != here:
            raise ValueError(f"{folder}: cannot resume, {name} is {state[name]!r} there and {here!r} here")
    tensors = load_file(folder / "training.safetensors")
    model.load_state_dict(_below("model", tensors))
    if ema is not None:
        for name, value in _below("ema", tensors).items():
            ema.average[name].copy_(value)
    optimiser.load_state_dict(optimiser.state_dict() | {"state": _states(_below("optimiser", tensors))})
    device = next(model.parameters()).device
    # Copies: a file's tensors lie at any place, and the last digit of a product may hang on where its operands lie.
    rows = {
        name: value.to(device, copy=True) for name, value in load_file(folder / f"carry-{rank()}.safetensors").items()
    }
    carry = Carry(_below("state", rows), rows["steps"], rows["halted"], _below("data", rows))
    return state["step"], carry, _below("tally", rows)


def _started(model: TRM, ema: EMA | None, seed: int) -> dict:
    """What a run and its resumption must have in common."""
    average = None if ema is None else ema.decay
    return {"network": model.config.model_dump(), "seed": seed, "processes": world(), "ema": average}


def _plain(carry: Carry) -> dict[str, Tensor]:
    named = _named("state", carry.state) | _named("data", carry.data)
    return named | {"steps": carry.steps_B, "halted": carry.halted_B}


def _moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimiser.state_dict()["state"]
    return {f"optimiser.{i}.{name}": value for i, state in states.items() for name, value in state.items()}


def _states(named: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in named.items():
        i, name = key.split(".")
        states.setdefault(int(i), {})[name] = value
    return states


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): value for n, value in tensors.items() if n.startswith(f"{prefix}.")}
