"""A cache has two names: `cache` for transformers since 5.24, `past_key_values` before. Ours knows both, always."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import undertow as ut
from models import CONFIGS, build, gap, ids
from undertow.cache import UndertowCache
from undertow.versions import CACHE

BOTH = pytest.mark.parametrize("name", ["cache", "past_key_values"])


@pytest.fixture(scope="module")
def model():
    return build("llama", time=ut.T2MLR(1, 2)).eval()


@torch.no_grad()
@BOTH
def test_an_output_gives_its_cache_under_either_name(model, name):
    out = model(ids(1, 4), use_cache=True)
    cache = getattr(out, name)
    assert isinstance(cache, UndertowCache) and out[name] is cache and out.get(name) is cache and name in out
    assert list(out.keys()).count("cache") == 1 and "past_key_values" not in list(out.keys())  # held once
    setattr(out, name, None)
    assert out.cache is None and out.past_key_values is None
    out[name] = cache
    assert out.cache is cache and out.past_key_values is cache
    without = model(ids(1, 4), use_cache=False)
    assert name not in without and without.get(name, 7) == 7 and getattr(without, name) is None


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("family", ["llama", "undertow_llama", "undertow_nanochat"])
def test_every_model_of_ours_takes_its_cache_under_either_name(family, name):
    """The plain nanochat model too; the plain Llama's language model is Hugging Face's class, which may warn."""
    ours, x = build(family, time=ut.T2MLR(1, 2)).eval(), ids(2, 6)
    for model in (ours, ours.backbone)[: 1 + (family == "undertow_nanochat")]:
        cache = model(x[:, :4], use_cache=True)[CACHE]
        rest = model(x[:, 4:], **{name: cache}, use_cache=True).logits
        assert gap(rest, model(x, use_cache=False).logits[:, 4:]) < 1e-8


def test_two_different_caches_are_refused(model):
    first, second = (model(ids(1, 4), use_cache=True).cache for _ in range(2))
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one thing"):
        model(ids(1, 1), cache=first, past_key_values=second)


@torch.no_grad()
def test_generation_goes_on_from_a_cache(model):
    first = model.generate(ids(1, 4), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    again = model.generate(first.sequences, max_new_tokens=3, do_sample=False, **{CACHE: first[CACHE]})
    assert torch.equal(again, model.generate(first.sequences, max_new_tokens=3, do_sample=False))


def test_a_plain_llama_recomputes_its_layers_without_its_cache():
    """Else the layers would write their keys into it once more when they are recomputed."""
    model = AutoModelForCausalLM.from_config(CONFIGS["undertow_llama"]()).train()
    new = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
    out = model(ids(2, 5), labels=ids(2, 5), use_cache=True)
    out.loss.backward()
    assert out[CACHE].get_seq_length() in (0, 5)
