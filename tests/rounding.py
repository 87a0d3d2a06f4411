"""What is computed is compared to rounding, what is copied to the bit: `assert_same` here, `torch.equal` there.

The last digit of a product depends on the processor, on its library and on where its operands lie in memory. So only
what no arithmetic has touched (weights, token ids, masks) and a run that was stopped and resumed on one machine is held
to bits.
"""

import math

import torch

# The largest difference over the largest value: some thousand times a last digit.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; what is infinite must be so in both, at the same places."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{found.dtype} is not {expected.dtype}"
    finite = expected.isfinite()
    assert torch.equal(found[~finite], expected[~finite]), "not infinite at the same places"
    if not finite.any():
        return 0.0
    a, b = found[finite].detach().double(), expected[finite].detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def same(found: torch.Tensor, expected: torch.Tensor, within: float | None = None) -> bool:
    """Whether two computed tensors are equal to rounding: `within`, relative to the largest value, or their type's."""
    return apart(found, expected) <= (ROUNDING[expected.dtype] if within is None else within)


def assert_same(found: torch.Tensor, expected: torch.Tensor, within: float | None = None, about=None) -> None:
    """Fail with the figure unless two computed tensors are equal to rounding (`same`)."""
    gap, most = apart(found, expected), ROUNDING[expected.dtype] if within is None else within
    assert gap <= most, f"{gap:.1e} apart, {most:.0e} allowed" + (f": {about}" if about is not None else "")


def alike(found, expected, rel: float = 1e-5) -> bool:
    """Whether two nests of results are equal, their floats to rounding (of float32, unless said)."""
    if isinstance(expected, dict):
        both = isinstance(found, dict) and found.keys() == expected.keys()
        return both and all(alike(found[key], value, rel) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        both = isinstance(found, (list, tuple)) and len(found) == len(expected)
        return both and all(alike(a, b, rel) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(found, expected, rel_tol=rel, abs_tol=1e-12)
    return found == expected


def assert_copied(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Fail unless two modules hold the same names with the same bits: what was saved is what was loaded."""
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys(), sorted(mine.keys() ^ theirs.keys())
    wrong = [name for name, x in theirs.items() if mine[name].dtype != x.dtype or not torch.equal(mine[name], x)]
    assert not wrong, f"not the same bits: {', '.join(wrong)}"
