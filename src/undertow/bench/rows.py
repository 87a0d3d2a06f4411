"""The rows of the table: what is measured, what the published code reaches, what is to be reached, and the floor.

Published figures were measured by us from the published code at the same sizes on another day (1 thread, CPU seconds).
Floors are FLOP counts, or what the weights alone take to read. "Trained" models are trained here, on the standard
library's text, before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from undertow.bench import measure, models, work
from undertow.bench.measure import Ratio
from undertow.bench.models import Size
from undertow.bench.work import Work
from undertow.schedules import Cyclic, Jacobi

__all__ = ["ROWS", "Result", "Row", "run"]


@dataclass(frozen=True)
class Row:
    """One figure. `how`: what is compared (with `speed` more is better); `slow` rows run only when they are named.

    `turns`: rounds that one round asked for is here; a second of generating varies more than a step of training.
    """

    name: str
    about: str
    published: str
    target: float
    floor: str
    make: Callable[[Size], Work]
    size: Size
    how: Callable[..., Ratio] = measure.times
    slow: bool = False
    turns: int = 1

    @property
    def more_is_better(self) -> bool:
        """Whether the row is a speed; else a cost."""
        return self.how is measure.speed

    def met(self, value: float) -> bool:
        """Whether a measured value reaches the target."""
        return value >= self.target if self.more_is_better else value <= self.target


@dataclass(frozen=True)
class Result:
    """What one row came to. `met` is None for a tiny run, whose ratio says nothing."""

    row: Row
    ratio: Ratio
    note: str
    met: bool | None


def run(row: Row, rounds: int = 5, tiny: bool = False) -> Result:
    """Measure one row: build both models, then interleaved rounds. `tiny`: only see that it runs."""
    done = row.make(row.size.tiny() if tiny else row.size)
    ratio = row.how(done.ours, done.theirs, rounds if tiny else rounds * row.turns)
    met = None if tiny else row.met(ratio.median) and done.holds is not False
    return Result(row, ratio, done.note, met)


STEP = Size(layers=8, width=256, mlp=688, heads=4, vocabulary=512, batch=2, tokens=256, steps=200)
SMALL = Size(layers=4, width=128, mlp=512, heads=4, vocabulary=1024, batch=4, tokens=256)
RECURSIVE = Size(layers=6, width=256, mlp=1024, heads=4, vocabulary=1024, batch=4, tokens=128)
DEEP = Size(layers=8, width=256, mlp=1024, heads=2, vocabulary=2048, batch=1, tokens=512)
SCORED = Size(layers=4, width=128, mlp=512, heads=2, vocabulary=512, batch=1, tokens=1024, steps=250)
PROMPT = replace(STEP, batch=1, tokens=32, new=64, steps=0)

# The cheapest that stay within their bounds on these weights: with 8 subsets the memory does not, with a product less
# the gradient does not.
exact = partial(work.faithful_step, schedule=Cyclic(10, 3, adjoint=4), memory=5e-5, gradient=0.05)
fast = partial(work.faithful_step, schedule=Cyclic(10, 2, adjoint=3), memory=3e-3, gradient=0.10)
adjoint = partial(
    work.faithful_step, schedule=Jacobi(16, adjoint=4, start="unmixed"), memory=5e-5, gradient=0.05
)  # the published passes and their gradient, on the model of the rows below
reuse = (4, 2, 1, 1)
score_t2mlr = partial(
    work.scoring, config=models.llama, method=work.GATED, gates=1.0, schedule=Cyclic(6, 4), memory=2e-5
)
score_lrt = partial(
    work.scoring, config=models.nanochat, method=work.RECURRENT, gates=None, schedule=Cyclic(8, 5), memory=2e-5
)

ROWS = {
    row.name: row
    for row in (
        Row("t2mlr-published", "T2MLR step, D=16 with 4 backward", "5.6", 5.2, "5.0", work.published_step, STEP),
        Row("t2mlr-adjoint", "the same, its live passes by the adjoint", "5.6", 5.2, "5.0", adjoint, STEP),
        Row("t2mlr-exact", "T2MLR step, memory <= 5e-5, gradient <= 5 %", "5.6", 2.5, "1.4", exact, STEP),
        Row("t2mlr-fast", "T2MLR step, memory <= 3e-3, gradient <= 10 %", "-", 2.0, "1.4", fast, STEP),
        Row(
            "memory-published", "its peak memory", "4.1", 2.6, "1.0", work.published_step, STEP, measure.memory
        ),
        Row(
            "memory-recomputed", "the same, visits recomputed in backward", "-", 2.6, "1.0",
            partial(work.published_step, recompute=True), STEP, measure.memory,
        ),
        Row(
            "memory-adjoint", "peak memory of t2mlr-adjoint", "4.1", 2.6, "1.0",
            adjoint, STEP, measure.memory,
        ),
        Row("memory-exact", "peak memory of t2mlr-exact", "-", 1.1, "1.0", exact, STEP, measure.memory),
        Row("memory-fast", "peak memory of t2mlr-fast", "-", 1.1, "1.0", fast, STEP, measure.memory),
        Row("lrt-shared", "LRT interleaved step", "-", 2.1, "2.0", partial(work.interleaved_step, shared=True), DEEP),
        Row(
            "lrt-layerwise", "LRT interleaved step, maps a layer", "2.12-2.37", 2.2, "2.11",
            partial(work.interleaved_step, shared=False), DEEP,
        ),
        Row(
            "lrt-decode", "LRT decode per token", "1.13-1.18", 1.06, "1.01",
            work.lrt_decode, replace(DEEP, tokens=96), measure.steps,
        ),
        Row(
            "lrt-decode-compiled", "LRT decode, compiled layers", "-", 1.04, "1.01",
            work.lrt_decode_compiled, replace(DEEP, tokens=96), slow=True,
        ),
        Row(
            "t2mlr-decode-1", "T2MLR decode, B 1", "1.14", 1.08, "1.05", work.t2mlr_decode, PROMPT, measure.steps,
        ),
        Row(
            "t2mlr-decode-8", "T2MLR decode, B 8", "1.08", 1.05, "1.02", work.t2mlr_decode, replace(PROMPT, batch=8),
            measure.steps,
        ),
        Row(
            "ilr-decode", "ILR [4,2,1,1], 256 new tokens, speed", "0.22", 1.0, "1.0",
            partial(work.reuse_decode, counts=reuse), replace(SMALL, batch=1, tokens=16, new=256), measure.speed,
        ),
        Row(
            "score-t2mlr", "exact scoring, T2MLR, times faster than stepping", "0.81", 6.5, "passes", score_t2mlr,
            replace(STEP, batch=1, tokens=1024), measure.speed,
        ),
        Row(
            "score-lrt", "exact scoring, LRT, times faster than stepping", "0.81", 4.0, "passes", score_lrt,
            SCORED, measure.speed,
        ),
        Row(
            "reuse-step", "reuse map [4,2,1,1] step", "0.98-1.0", 1.0, "1.0",
            partial(work.reuse_step, counts=reuse), SMALL,
        ),
        Row(
            "trm-a", "GPTTRM option A step", "2.05", 1.9, "dead cycles forward",
            partial(work.recursion_step, insert=-1), RECURSIVE,
        ),
        Row(
            "trm-b", "GPTTRM option B step", "2.31", 2.1, "dead cycles forward",
            partial(work.recursion_step, insert=None), RECURSIVE,
        ),
        Row(
            "plain-decode", "plain greedy decode, speed", "1.0", 1.2, "2.4 (weight reads)", work.plain_decode,
            replace(PROMPT, layers=6), measure.speed, turns=5,
        ),
        Row(
            "plain-decode-compiled", "plain greedy decode, compiled layers, speed", "-", 1.35, "2.4 (weight reads)",
            partial(work.plain_decode, compiled=True), replace(PROMPT, layers=6), measure.speed, slow=True,
        ),
    )
}  # fmt: skip
