"""How cost grows with text length, loop count and sweeps: `python benchmarks/growth.py [OUT.json] [--tiny]`.

A Llama of 4 layers (d 128, 4 heads, MLP 512, vocabulary 1024, float32), one row, one thread: forward and backward of a
loss. Seconds are processor seconds, the median of 5 after one that does not count; bytes are the peak that torch's
allocator sees beyond the weights; FLOPs are those of `analysis.flops`. An exponent is the slope of a straight line
through the logarithms (least squares): 1 is linear, 2 quadratic.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import undertow as ut
from undertow.analysis import label
from undertow.analysis.counts import peak_bytes
from undertow.analysis.flops import training_flops
from undertow.bench.measure import seconds
from undertow.bench.models import llama
from undertow.bench.rows import SMALL

LENGTHS, LOOPS, SWEEPS = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8), (1, 2, 4, 8, 16)
AT = 512  # tokens, where something else grows
TIME = ut.T2MLR(1, 2)
BY_LENGTH = {
    "plain": (None, None, ut.Jacobi(0)),
    "reuse map [4, 2, 1, 1]": (ut.ReuseMap([4, 2, 1, 1]), None, ut.Jacobi(0)),
    "T2MLR, Jacobi(3)": (None, TIME, ut.Jacobi(3)),
    "T2MLR, Cyclic(8, 3, adjoint=4)": (None, TIME, ut.Cyclic(8, 3, adjoint=4)),
    "LRT, Interleaved(2)": (None, ut.LRT(), ut.Interleaved(2)),
}
BY_SWEEPS: dict[str, Callable] = {
    "T2MLR, Jacobi(K)": lambda K: ut.Jacobi(K),
    "T2MLR, Jacobi(K, backward=1)": lambda K: ut.Jacobi(K, backward=1),
    "T2MLR, Cyclic(8, n, adjoint=4)": lambda n: ut.Cyclic(8, n, adjoint=4),
}


def cases(tiny: bool) -> Iterator[tuple[str, str, int, tuple]]:
    """`(what grows, row, how much of it, (depth, time, schedule, tokens))`."""
    lengths, loops, sweeps, at = ((16, 32), (1, 2), (1, 2), 16) if tiny else (LENGTHS, LOOPS, SWEEPS, AT)
    for name, parts in BY_LENGTH.items():
        yield from (("tokens", name, T, (*parts, T)) for T in lengths)
    yield from (("loops", "BlockLoop(n)", n, (ut.BlockLoop(n), None, ut.Jacobi(0), at)) for n in loops)
    for name, make in BY_SWEEPS.items():
        yield from (("sweeps", name, n, (None, TIME, make(n), at)) for n in sweeps)


def measured(depth, time, schedule, T: int, rounds: int) -> dict[str, float]:
    """Seconds, bytes and FLOPs of one forward and backward."""
    torch.manual_seed(0)
    size = SMALL
    config = llama(size, tie_word_embeddings=True)
    config.max_position_embeddings = max(LENGTHS)
    model = ut.from_scratch(config, depth=depth, time=time).train()
    x_BT = torch.randint(size.vocabulary, (1, T))

    def step() -> None:
        model.zero_grad()
        model(x_BT, labels=x_BT, schedule=schedule).loss.backward()

    taken = [seconds(step) for _ in range(rounds + 1)][1:]
    flops = float(training_flops(model, T, schedule))
    return {"seconds": statistics.median(taken), "bytes": peak_bytes(step), "flops": flops}


def exponent(points: list[tuple[float, float]]) -> float:
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("out", nargs="?", type=Path)
    given.add_argument("--tiny", action="store_true", help="only see that it runs")
    asked = given.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], list[dict]] = {}
    for what, name, n, case in cases(asked.tiny):
        one = {"n": n, "schedule": label(case[2])} | measured(*case, rounds=1 if asked.tiny else 5)
        rows.setdefault((what, name), []).append(one)
        print(f"{what:7s} {n:5d}  {name:32s} {one['seconds']:8.3f} s {one['bytes'] / 2**20:9.1f} MiB", flush=True)
    found = []
    for (what, name), points in rows.items():
        keys = ("seconds", "bytes", "flops")
        exponents = {key: round(exponent([(p["n"], p[key]) for p in points]), 3) for key in keys}
        found.append({"grows": what, "name": name, "points": points, "exponents": exponents})
        said = ", ".join(f"{key} {value:.2f}" for key, value in exponents.items())
        print(f"{name}: exponents in {what}: {said}")
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
