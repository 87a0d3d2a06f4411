"""The recursion of every variant as a plan, run by the executor that runs all other plans of this package.

Registers: x, the embedded puzzle, is `h`; the answer is `y` (in `singlez`: `z`), latents are `z` or `z0`..`z5`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from undertow.edges import Program
from undertow.execute import Executor
from undertow.frames import Frame, Sequence
from undertow.masks import Masks
from undertow.methods.recursion import cycles, recursion
from undertow.plan import Plan, Visit, unroll
from undertow.trm.config import Network

LATENTS = tuple(f"z{i}" for i in range(6))  # of hier6


@dataclass(frozen=True)
class Recursion:
    """What one supervision step runs: `blocks` by name, on `registers` that are carried to the next step.

    `answer`: the register that the heads read.
    """

    plan: Plan
    blocks: tuple[str, ...]
    registers: tuple[str, ...]
    answer: str = "y"

    def program(self) -> Program:
        """The plan, unrolled. Every block is an extra one: there is no backbone."""
        return Program(tuple(unroll(self.plan, 0, self.blocks, self.registers)), (), (), (), ())


def of(network: Network) -> Recursion:
    """The recursion of a network."""
    low = tuple(f"block_{i}" for i in range(network.layers))
    n, T = network.inner, network.outer
    if network.variant == "trm":
        return Recursion(recursion(low, n, T), low, ("z", "y"))
    if network.variant == "singlez":
        return Recursion(cycles(through(low, "z", "h"), through(low, "z"), n, T), low, ("z",), "z")
    if network.variant == "hier6":
        inner = tuple(visit for i in range(n) for visit in through(low, *_first(LATENTS, i), "y", "h"))
        return Recursion(cycles(inner, through(low, "y", *LATENTS), 1, T), low, (*LATENTS, "y"))
    if network.variant == "hrm":
        high = tuple(f"high_{i}" for i in range(network.layers))
        plan = cycles(through(low, "z", "y", "h"), through(high, "y", "z"), n, T, grad_inner=1)
        return Recursion(plan, (*low, *high), ("z", "y"))
    return Recursion(through(low, "y", "h"), low, ("y",))


def through(blocks: tuple[str, ...], own: str, *others: str) -> Plan:
    """`own <- R(own + others)`, R the blocks in turn."""
    return tuple(Visit(block, (own, *others) if i == 0 else (own,), own) for i, block in enumerate(blocks))


def _first(names: tuple[str, ...], i: int) -> tuple[str, ...]:
    return (names[i], *names[:i], *names[i + 1 :])


def run(program: Program, blocks: nn.ModuleDict, x_BSD: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The registers after the program, from those of `state` and from x."""
    B, S, D = x_BSD.shape
    seq = Sequence(x_BSD, {}, Masks(S, 0, None, x_BSD.device), {}, torch.empty(B, 0, D))
    executor = Executor(program, None, blocks)  # type: ignore[arg-type]  # no step visits a backbone
    return executor.steps(program.steps, {**state, "h": x_BSD}, Frame(seq.everywhere, None, None), seq, {})
