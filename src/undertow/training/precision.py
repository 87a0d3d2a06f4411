"""Which device, how many processes, and whether bfloat16 is fast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import PartialState


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `mps` means on this machine. Raises ValueError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, found in there.items() if found))
    if name not in there:
        raise ValueError(f"--device {name!r}: allowed are auto, {', '.join(sorted(there))}")
    if not there[name]:
        raise ValueError(f"--device {name}: this machine has none")
    return torch.device(name)


def parallel() -> PartialState:
    """Who trains in parallel (`torchrun`); on its own, one process."""
    return PartialState(cpu=not torch.cuda.is_available())


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether autocast to bfloat16 pays: GPUs that compute in it, CPUs with the AVX-512 or AMX instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere float32 is the safe answer
    if device.type == "cpu" and cpuinfo.exists():
        flags = cpuinfo.read_text(encoding="utf-8")
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """What `auto`, `float32` or `bfloat16` means on this device."""
    return precision == "bfloat16" or (precision == "auto" and bfloat16_is_fast(device))


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of this precision (does nothing in float32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(precision, device))
