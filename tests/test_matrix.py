"""Every row of the matrix, for every case. Default: all methods on Llama, four methods on every other family."""

import pytest

import matrix
import undertow as ut
from matrix import Case
from models import CONFIGS

DEPTHS = [
    None,
    ut.ReuseMap([2, 1, 3, 1]),
    ut.BlockLoop(2),
    ut.BlockLoop(2, inject=True),
    ut.MiddleLoop(1, -2, 3, inject=True),
    ut.MiddleLoop(0, 1, 2, inject=True),
    ut.TRMBlock(inner=2),
    ut.TRMBlock(-1, inner=2, layers=1, outer=1),
    ut.TRMBlock(0, inner=1, outer=3),
]
TIMES = [
    None,
    ut.T2MLR(1, 2),
    ut.T2MLR(2, 2, carry="residual", project=None),
    ut.T2MLR(0, -1, carry="residual", carry_detach=False, carry_norm=False, carry_weight=0.5),
    ut.LRT(),
    ut.LRT(1, shared=False),
    ut.LRT(2, residual=False, key=False),
    ut.LRT(-2, key=False, value=False),
    ut.T2MLR(1, 2, carry="skip", detach=True, pre_norm="rmsnorm", post_norm=True),
    ut.T2MLR(0, 1, carry="skip", carry_weight=0.5, carry_norm=False, carry_detach=False, mixer_options={"layers": 2}),
    ut.T2MLR(1, -1, mixer="var_norm_gated", pre_norm="layernorm", mixer_options={"vector": True}),
    ut.T2MLR(1, 2, mixer="alpha_coupled", project="mlp", project_options={"bottleneck": 8}),
    ut.T2MLR(2, 2, mixer="exponential_rotational_gated", carry="residual", mixer_options={"concat": True}),
    ut.T2MLR(1, 2, mixer="constant_weight", mixer_options={"weight": 0.3, "learned": True}),
    ut.T2MLR(0, 2, mixer="concat", carry="residual", carry_detach=False),
]  # the two mixers that replace the stream cannot be rows: a token they replace is not seen (core/test_t2mlr.py)
METHODS = [
    (None, ut.T2MLR(1, 2)),
    (None, ut.LRT(2)),
    (ut.ReuseMap([2, 1, 1, 2]), None),
    (ut.TRMBlock(inner=2), None),
]
PAIRS = [(d, t) for d in DEPTHS for t in TIMES]
ON_LLAMA = [Case("llama", d, t) for d, t in PAIRS]
ELSEWHERE = [Case(f, d, t) for f in CONFIGS if f != "llama" for d, t in METHODS]
REST = [Case(f, d, t) for f in CONFIGS if f != "llama" for d, t in PAIRS if (d, t) not in METHODS]
# One depth x time pair and each single method on Llama for the dearer rows; the whole product where it is cheap.
CORE = [c for c in ON_LLAMA if c.depth is None or c.time is None] + [
    Case("llama", d, t) for d in DEPTHS[1::2] for t in (TIMES[1], TIMES[4])
]
FAST, ALL = (
    CORE + ELSEWHERE,
    [pytest.param(c, marks=pytest.mark.slow, id=str(c)) for c in ON_LLAMA + REST if c not in CORE],
)


@matrix.every_row([*FAST, *ALL])
def test_matrix(row, case, tmp_path):
    matrix.run(row, case, tmp_path)
