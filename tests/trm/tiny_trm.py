"""A tiny network, and puzzles to copy: each cell of the label is the cell of the input plus one."""

import torch

from undertow.trm.config import TRMConfig
from undertow.trm.model import TRM

L, V, PUZZLES = 5, 7, 4
SIZES = {"width": 16, "heads": 2, "inner": 2, "outer": 2, "prefix": 2, "max_steps": 4}


def config(**changes) -> TRMConfig:
    return TRMConfig(**{**SIZES, "vocab_size": V, "seq_len": L, "num_identifiers": PUZZLES, **changes})


def model(**changes) -> TRM:
    """In float64, with puzzle vectors and a Q head that are not zero."""
    made = TRM(config(**changes)).double()
    if made.puzzles is not None:
        torch.nn.init.normal_(made.puzzles.table)
    torch.nn.init.normal_(made.q_head.weight)
    torch.nn.init.zeros_(made.q_head.bias)
    return made


class Copying:
    """Endless batches; `interrupt` raises KeyboardInterrupt instead of the batch of that number."""

    vocab_size, seq_len, num_identifiers = V, L, PUZZLES

    def __init__(self, interrupt=None):
        self.interrupt = interrupt

    def batches(self, batch_size, seed, start=0):
        number = start
        while True:
            if number == self.interrupt:
                raise KeyboardInterrupt
            yield batch(batch_size, 1000 * seed + number)
            number += 1


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(1, V - 1, (rows, L), generator=generator)
    labels = torch.where(torch.rand(rows, L, generator=generator) < 0.2, -100, inputs + 1)
    return {
        "inputs": inputs,
        "labels": labels,
        "puzzle_identifiers": torch.randint(PUZZLES, (rows,), generator=generator),
    }
