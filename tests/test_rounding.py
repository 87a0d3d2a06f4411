"""The tests' own ways to compare, and to lay tensors where no allocator does: both can fail."""

import pytest
import torch

import relay
from models import build, ids
from rounding import alike, assert_copied, assert_same, same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_last_digit_is_rounding_and_more_is_not(dtype):
    x, digit = torch.linspace(-3, 3, 50).to(dtype), torch.finfo(dtype).eps
    assert_same(x * (1 + digit), x)
    for wrong in (x * (1 + 1e5 * digit), x.to(torch.float16), x[:-1], torch.full_like(x, float("nan"))):
        with pytest.raises(AssertionError):
            assert_same(wrong, x)


def test_what_is_infinite_must_be_so_in_both():
    x = torch.tensor([0.0, float("-inf"), 2.0])
    assert same(x, x.clone())
    with pytest.raises(AssertionError, match="same places"):
        same(x.flip(0), torch.tensor([0.0, 1.0, float("-inf")]))


def test_nests_of_results():
    result = {"nats": 1.5, "texts": ["a"], "parts": [{"n": 3, "bits": 0.25}]}
    assert alike(result, {"nats": 1.5 * (1 + 1e-7), "texts": ("a",), "parts": [{"n": 3, "bits": 0.25}]})
    for wrong in ({"nats": 1.5001}, {"texts": ["b"]}, {"parts": [{"n": 4, "bits": 0.25}]}, {"parts": []}, {"more": 1}):
        assert not alike(result | wrong, result)


def test_relaid_is_the_same_model_elsewhere():
    """Weights to the bit and logits to rounding, at odd places; tied stays tied; one changed bit is a copy no more."""
    model, other = (build("llama", tie_word_embeddings=True) for _ in range(2))
    relay.read(other)
    places = {p.data_ptr() % 64 for p in other.parameters()}
    assert 0 not in places and len(places) > 3
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert_copied(other, model)
    assert_same(other(ids()).logits, model(ids()).logits)
    assert relay.built(torch.ones(3)).data_ptr() % 64 != 0
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-15
    with pytest.raises(AssertionError, match="not the same bits: "):
        assert_copied(other, model)
