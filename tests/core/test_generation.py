"""Generation through Hugging Face's own loop: every way of starting, continuing and sampling gives the same text."""

import pytest
import torch

import undertow as ut
from matrix import padded
from models import build, gap, ids
from undertow.versions import CACHE

MODELS = [(None, ut.T2MLR(1, 2)), (ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)), (ut.TRMBlock(inner=2), None)]
models = pytest.mark.parametrize("depth, time", MODELS, ids=str)


def greedy(model, x, **kwargs):
    return model.generate(x, max_new_tokens=6, do_sample=False, pad_token_id=1, **kwargs)


@models
def test_with_and_without_cache(depth, time):
    model, x = build("qwen3", depth, time), ids(2, 7)
    assert torch.equal(greedy(model, x), greedy(model, x, use_cache=False))


@models
def test_chunked_prefill(depth, time):
    model, (x, mask) = build("llama", depth, time), padded(ids(2, 9), [0, 3])
    whole = greedy(model, x, attention_mask=mask)
    for size in (1, 2, 4):
        assert torch.equal(greedy(model, x, attention_mask=mask, prefill_chunk_size=size), whole)


@models
def test_token_by_token_prefill_on_request(depth, time):
    model, x = build("llama", depth, time), ids(2, 7)
    assert torch.equal(greedy(model, x, schedule=ut.Sequential()), greedy(model, x))


@models
def test_continuing_from_a_returned_cache(depth, time):
    model, x = build("gpt2", depth, time), ids(2, 5)
    first = greedy(model, x, return_dict_in_generate=True)
    more = torch.cat([first.sequences, ids(2, 3, seed=5)], 1)
    again = greedy(model, more, **{CACHE: first[CACHE]})
    assert torch.equal(again, greedy(model, more))


@torch.no_grad()
@pytest.mark.parametrize("both", [False, True], ids=["embeddings", "tokens_too"])
def test_from_embeddings(both):
    """What the embeddings of a prompt generate is what the prompt does; tokens given as well come back, too."""
    model, (x, mask) = build("gpt2", None, ut.T2MLR(1, 2)), padded(ids(2, 5), [0, 2])
    given = dict(inputs_embeds=model.get_input_embeddings()(x), attention_mask=mask)
    given |= {"input_ids": x} if both else {}
    settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=1)
    for how in ({}, dict(use_cache=False), dict(num_beams=2)):
        found = model.generate(**given, **settings, **how)
        wanted = model.generate(x, attention_mask=mask, **settings, **how)
        assert torch.equal(found, wanted[:, 0 if both else x.shape[1] :]), how


@models
def test_sampling_with_a_seed_and_several_returns(depth, time):
    model, x = build("gpt2", depth, time), ids(2, 5)
    arguments = dict(max_new_tokens=6, do_sample=True, top_k=5, num_return_sequences=3, pad_token_id=1)
    torch.manual_seed(1)
    a = model.generate(x, **arguments)
    torch.manual_seed(1)
    b = model.generate(x, use_cache=False, **arguments)
    assert a.shape == (6, 11) and torch.equal(a, b) and not torch.equal(a[0], a[1])


def test_memory_mask_covers_the_prompt_and_is_extended_with_ones():
    """T2MLR's control flow: a plain prompt, a recurrent answer."""
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, 6)
    mask = torch.zeros(2, 6, dtype=torch.long)
    generated = greedy(model, x, memory_mask=mask)
    assert torch.equal(generated, greedy(model, x, memory_mask=mask, use_cache=False))
    text = x
    for _ in range(6):
        full = torch.cat([mask, torch.ones(2, text.shape[1] - 6, dtype=torch.long)], 1)
        text = torch.cat([text, model(text, memory_mask=full).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, text)
    plain, recurrent = model(x, memory_mask=mask).logits, model(x).logits
    assert gap(plain, recurrent) > 1e-3
    base = ut.wrap(model.backbone)
    assert gap(plain, base(x).logits) < 1e-12  # an unmixed prompt is the backbone itself


def test_row_results_do_not_depend_on_batch_mates():
    """The published exact path applied the cache residual to every row once any row was recurrent."""
    model = build("gpt2", time=ut.T2MLR(1, 2, carry="residual"))
    x = ids(2, 8)
    mask = torch.tensor([[0] * 6 + [1] * 2, [0] * 2 + [1] * 6])
    both = model(x, memory_mask=mask).logits
    for b in range(2):
        alone = model(x[b : b + 1], memory_mask=mask[b : b + 1]).logits
        assert gap(both[b], alone[0]) < 1e-12


def test_state_lives_in_the_cache_alone():
    """Two interleaved conversations on one model do not disturb each other, and a failed call leaves nothing behind."""
    model = build("gpt2", time=ut.LRT(2))
    a, b = ids(1, 6, seed=1), ids(1, 6, seed=2)
    expected = [model(x).logits for x in (a, b)]
    caches, parts = [None, None], [[], []]
    for t in range(6):
        for i, x in enumerate((a, b)):
            out = model(x[:, t : t + 1], past_key_values=caches[i], use_cache=True)
            caches[i] = out.past_key_values
            parts[i].append(out.logits)
        with pytest.raises(IndexError):
            model(torch.tensor([[10_000]]))
    for i in range(2):
        assert gap(torch.cat(parts[i], 1), expected[i]) < 1e-12


def test_memory_of_the_output():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, 6)
    out = model(x)
    assert out.memory.shape == (2, 6, 32) and out.residual <= 1e-10 and out.passes >= 2
    assert torch.equal(out.past_key_values.memory_BND[:, 0], out.memory[:, -1])
    assert build("gpt2")(x).memory is None
