"""Tokens that are cut off again: the cache is as if they had not been, and assisted decoding gives the same text."""

import pytest
import torch

import undertow as ut
from matrix import padded
from models import build, gap, ids
from undertow.cache import UndertowCache

MODELS = [
    (None, ut.T2MLR(1, 2, carry="residual")),
    (ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)),
    (ut.MiddleLoop(1, 2, 2, inject=True), ut.T2MLR(0, -1)),
    (ut.TRMBlock(inner=2), None),
    (None, ut.Coconut(token=3)),
]
models = pytest.mark.parametrize("depth, time", MODELS, ids=str)


def generate(model, x, **kwargs):
    return model.generate(x, max_new_tokens=12, do_sample=False, pad_token_id=1, **kwargs)


@models
@torch.no_grad()
def test_a_cut_cache_is_that_of_the_tokens_kept(depth, time):
    """Whatever was read after them, in whatever portions, left pads and the empty cache included."""
    model, (x, mask) = build("gpt_neox", depth, time), padded(ids(2, 9), [0, 3])
    for kept in (0, 4, 7):
        cache = UndertowCache(model.program.slots)
        cache.activate_past_recording()
        for first, last in ((0, 5), (5, 6), (6, 9)):
            model(x[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
        cache.crop(kept - 9)
        assert cache.get_seq_length() == kept
        if kept:
            fresh = model(x[:, :kept], attention_mask=mask[:, :kept]).past_key_values
            for mine, other in zip(cache.layers, fresh.layers, strict=True):
                assert gap(mine.keys, other.keys) < 1e-9 and gap(mine.values, other.values) < 1e-9
            assert fresh.memory_BND is None or gap(cache.memory_BND, fresh.memory_BND) < 1e-9
        again = model(x[:, kept:], attention_mask=mask, past_key_values=cache).logits
        assert gap(again, model(x, attention_mask=mask).logits[:, kept:]) < 1e-8


@torch.no_grad()
def test_recording_from_the_middle_moves_with_beams():
    model, x = build("llama", time=ut.T2MLR(1, 2)), ids(2, 8)
    cache = model(x[:, :4]).past_key_values
    cache.activate_past_recording()
    cache.activate_past_recording()  # no second start
    model(x[:, 4:], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-4)
    swapped = x[[1, 1]]
    assert gap(model(swapped[:, 4:], past_key_values=cache).logits, model(swapped).logits[:, 4:]) < 1e-8
    with pytest.raises(ValueError, match="the memories of 5 tokens are recorded"):
        cache.crop(-5)


@models
def test_prompt_lookup_and_assistants_change_nothing(depth, time):
    """An assistant that is the model itself, one that is another and mostly wrong, and words of the prompt."""
    model = build("llama", depth, time)
    x = torch.cat([ids(1, 6), ids(1, 6)], 1)  # a prompt that repeats itself
    alone = generate(model, x)
    torch.manual_seed(5)
    wrong = build("llama", time=ut.T2MLR(1, 2), num_hidden_layers=3)
    for p in wrong.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    seen = []
    crop = UndertowCache.crop
    for arguments in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}, {"assistant_model": wrong}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UndertowCache, "crop", lambda self, n: (seen.append(n), crop(self, n))[1])
            assert torch.equal(generate(model, x, **arguments), alone), arguments
    assert min(seen) < 0  # something was refused


@torch.no_grad()
def test_nothing_is_recorded_unasked():
    model = build("llama", time=ut.T2MLR(1, 2))
    cache = model(ids(1, 5)).past_key_values
    assert cache.history_BTND is None
    cache.activate_past_recording()
    for _ in range(3):
        model(ids(1, 1), past_key_values=cache)
    assert cache.history_BTND.shape[1] == 4
    cache.reset()
    assert cache.history_BTND is None and cache.memory_BND is None


@torch.no_grad()
def test_a_plain_assistant_does_not_get_what_only_ours_takes():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(1, 6)
    assistant = build("gpt2", seed=1).backbone
    mask = torch.zeros_like(x)
    wanted = generate(model, x, memory_mask=mask)
    assert torch.equal(generate(model, x, memory_mask=mask, assistant_model=assistant), wanted)
