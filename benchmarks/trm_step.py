"""What a supervision step costs beyond its blocks: `python benchmarks/trm_step.py [OUT.json]`.

The network of the paper (T = 3, n = 6, two blocks: 42 block evaluations, the last 14 with gradient) on 9x9 Sudoku, 81
cells and 16 prefix tokens, width 128, 4 heads, batch 8, float32, one thread. The step embeds, recurs, reads out, takes
the loss and goes backward; no optimiser. Its floor calls the same blocks as often on the same shape, one after the
other, 28 times without and 14 times with gradient, and goes backward: no injections, no embedding, no head, no loss.
The two are timed in turns, so that whatever else the machine does hits both, and in processor time, which other
processes on the same core do not add to; the ratio is of medians over the rounds.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from undertow.trm.config import TRMConfig
from undertow.trm.losses import losses
from undertow.trm.model import TRM

BATCH, ROUNDS, WARMUP = 8, 9, 2
SIZES = dict(width=128, heads=4, expansion=4.0, layers=2, inner=6, outer=3, vocab_size=11, seq_len=81)


def step(model: TRM) -> Callable[[], object]:
    """One supervision step, forward and backward."""
    config = model.config
    inputs, labels = torch.randint(1, config.vocab_size, (2, BATCH, config.seq_len))
    vectors = torch.randn(BATCH, config.vector)

    def run() -> None:
        model.zero_grad()
        _, logits, q = model(model.start(BATCH), inputs, vectors)
        losses(logits, q, labels).loss.backward()

    return run


def floor(model: TRM) -> Callable[[], object]:
    """The same block evaluations as a plain stack."""
    config, blocks = model.config, list(model.blocks.values())
    x_BSD = torch.randn(BATCH, config.tokens, config.width)
    cycle = config.inner + 1

    def run() -> None:
        model.zero_grad()
        h_BSD = x_BSD
        with torch.no_grad():
            for _ in range((config.outer - 1) * cycle):
                for block in blocks:
                    h_BSD = block(h_BSD)
        for _ in range(cycle):
            for block in blocks:
                h_BSD = block(h_BSD)
        h_BSD.mean().backward()

    return run


def compare(rounds: int = ROUNDS) -> dict:
    """Milliseconds of processor time of both, and how many times its floor a step takes."""
    model = TRM(TRMConfig(**SIZES))
    runs = {"step": step(model), "floor": floor(model)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for counts in [False] * WARMUP + [True] * rounds:
        for name, run in runs.items():
            start = time.process_time()
            run()
            if counts:
                seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "rounds": rounds,
        **{f"{name}_ms": round(1e3 * value, 1) for name, value in median.items()},
        "times_floor": round(median["step"] / median["floor"], 3),
        "times_floor_fastest": round(min(seconds["step"]) / min(seconds["floor"]), 3),
    }


def main(out: str | None = None):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = compare()
    line = "step {step_ms:.1f} ms, floor {floor_ms:.1f} ms: {times_floor:.3f} x (fastest {times_floor_fastest:.3f})"
    print(line.format(**row))
    if out:
        about = {
            "command": f"python benchmarks/trm_step.py {out}",
            "torch": torch.__version__,
            "threads": 1,
            "batch": BATCH,
        }
        Path(out).write_text(json.dumps({**about, **row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
