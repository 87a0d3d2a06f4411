"""Latent thoughts against a loop by hand over Hugging Face's own model with inputs_embeds, and their matrix rows."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import matrix
import undertow as ut
from matrix import Case
from models import CONFIGS, V, build, gap, gradient_gap, gradients, ids, randomise
from rounding import assert_same, same

LATENT = 7


def model_with(family="gpt2", **options):
    """The latent token has no embedding of its own: thoughts take its place, as published."""
    model = build(family, time=ut.Coconut(LATENT), **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[LATENT] = 0
    return model


def text(T=12, latent=(4, 5, 6), B=2):
    """Rows in which the latent token stands at `latent` and nowhere else."""
    x = ids(B, T)
    x = torch.where(x == LATENT, LATENT + 1, x)
    x[:, list(latent)] = LATENT
    return x


def by_hand(lm, x):
    """The published loop: the last hidden state of the token before is a thought's embedding (every row alike)."""
    embeddings, last = lm.get_input_embeddings()(x), None
    for t in range(x.shape[1]):
        if bool((x[:, t] == LATENT).all()):
            embeddings = torch.cat([embeddings[:, :t], last, embeddings[:, t + 1 :]], 1)
        if t + 1 < x.shape[1]:
            last = lm(inputs_embeds=embeddings[:, : t + 1], output_hidden_states=True).hidden_states[-1][:, -1:]
    return lm(inputs_embeds=embeddings).logits


@pytest.mark.parametrize("latent", [(1,), (4, 5, 6), (3, 7, 8, 11)])
@pytest.mark.parametrize(
    "family, tolerance", [("gpt2", 1e-12), ("llama", 1e-6), pytest.param("gpt_neox", 1e-6, marks=pytest.mark.slow)]
)
def test_thoughts_are_those_of_a_loop_by_hand(family, tolerance, latent):
    """Logits and gradients, with positions learned (they stay) and rotary.

    The latent token's own embedding is left out of the comparison: it is zero, but in our sum it has gradient.
    """
    model, x = model_with(family), text(latent=latent)
    mine = by_hand(model.backbone, x)
    w = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def found(logits):
        g = gradients(model, (logits * w).sum())
        next(iter(g.values()))[LATENT] = 0  # the first parameter is the token table
        return g

    wanted = found(mine)
    for schedule in (None, ut.Sequential(), ut.Jacobi(len(latent))):  # n+1 passes, as published, are enough
        out = model(x, schedule=schedule).logits
        assert gap(out, mine) < tolerance, schedule
        assert gradient_gap(found(out), wanted) < 10 * tolerance, schedule
    assert gap(model(x, schedule=ut.Jacobi(len(latent) - 1)).logits, mine) > 1e-4
    assert gap(model(x, memory_mask=torch.zeros_like(x)).logits, mine) > 1e-4


def test_a_thought_without_a_token_is_marked_by_the_caller():
    marked, x = model_with(), text()
    free = build("gpt2", time=ut.Coconut())
    free.load_state_dict(marked.state_dict())
    assert_same(free(x, memory_mask=x == LATENT).logits, marked(x).logits)


def test_training_goes_one_token_after_the_other():
    model, x = model_with().train(), text()
    assert model.schedule == ut.Sequential()
    labels = torch.where(x == LATENT, -100, x)  # thoughts are not predicted
    labels[:, :3] = -100
    loss = model(x, labels=labels).loss
    exact = model(x, labels=labels, schedule=ut.Converge()).loss
    assert loss.item() == pytest.approx(exact.item(), rel=1e-9)
    found = gradients(model, loss)
    assert float(found["backbone.transformer.h.0.attn.c_attn.weight"].norm()) > 0


@torch.no_grad()
def test_generate_after_thoughts():
    """Thoughts in the prompt, cached decoding after them; rows with another number of them, left-padded."""
    model, new = model_with(), 5
    rows = [text(8, (3, 4), B=1), text(8, (2, 3, 5), B=1)[:, 1:]]
    pads = torch.full((1, 1), 1)
    x = torch.cat([rows[0], torch.cat([pads, rows[1]], 1)])
    mask = torch.ones_like(x)
    mask[1, 0] = 0
    out = model.generate(x, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=1)
    for row, start, found in zip(rows, (0, 1), out, strict=True):
        expected = row
        for _ in range(new):
            expected = torch.cat([expected, by_hand(model.backbone, expected)[:, -1:].argmax(-1)], 1)
        assert torch.equal(found[start:], expected[0])


@torch.no_grad()
def test_a_thought_made_while_decoding():
    """The latent token fed alone, with a cache: its input is the memory that the cache holds."""
    model, x = model_with(), text(10, (4, 5, 6))
    full = model(x).logits
    out = model(x[:, :4], use_cache=True)
    parts = [out.logits]
    for t in range(4, 10):
        parts.append(model(x[:, t : t + 1], past_key_values=out.past_key_values).logits)
    assert gap(torch.cat(parts, 1), full) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("token", [None, pytest.param(LATENT, marks=pytest.mark.slow)])
def test_after_a_callers_mask_new_tokens_are_words(token):
    """Every way to generate from marked thoughts, against one whole forward a token with a mask that ends in zeros."""
    model, new = build("gpt2", time=ut.Coconut(token), seed=3), 4
    x = torch.where(ids(2, 9) == LATENT, LATENT + 1, ids(2, 9))
    mask = torch.zeros_like(x)
    mask[:, 5:7] = 1
    expected, marked = x, mask
    for _ in range(new):
        scores = model(expected, memory_mask=marked, use_cache=False).logits[:, -1]
        expected = torch.cat([expected, scores[:, :LATENT].argmax(-1, keepdim=True)], 1)
        marked = torch.nn.functional.pad(marked, (0, 1))
    everywhere = model(expected, memory_mask=torch.ones_like(expected), use_cache=False).logits
    assert gap(everywhere, model(expected, memory_mask=marked, use_cache=False).logits) > 1e-3

    words = dict(
        max_new_tokens=new, pad_token_id=1, suppress_tokens=list(range(LATENT, V))
    )  # no word is the latent token
    greedy = words | dict(do_sample=False)
    for how in ({}, dict(use_cache=False), dict(prefill_chunk_size=5), dict(do_sample=True, top_k=1)):
        assert torch.equal(model.generate(x, memory_mask=mask, **(greedy | how)), expected), how
    one = dict(memory_mask=mask[:1], **greedy)
    assert torch.equal(model.generate(x[:1], prompt_lookup_num_tokens=3, **one), expected[:1])
    beams = [model.generate(x, memory_mask=mask, num_beams=3, use_cache=c, **greedy) for c in (True, False)]
    assert torch.equal(*beams)
    rows = torch.cat([x[:1], torch.nn.functional.pad(x[1:, 3:], (3, 0), value=1)])
    marks = torch.cat([mask[:1], torch.nn.functional.pad(mask[1:, 3:], (3, 0))])
    real = torch.ones_like(rows)
    real[1, :3] = 0
    padded = model.generate(rows, attention_mask=real, memory_mask=marks, **greedy)
    alone = model.generate(x[1:, 3:], memory_mask=mask[1:, 3:], **greedy)
    assert torch.equal(padded[0], expected[0]) and torch.equal(padded[1, 3:], alone[0])

    out = model(x, memory_mask=mask, use_cache=True)  # by hand: the cache knows that a mask came before
    for t in range(9, 9 + new):
        assert gap(out.logits[:, -1], model(expected[:, :t], memory_mask=marked[:, :t]).logits[:, -1]) < 1e-9
        out = model(expected[:, t : t + 1], past_key_values=out.past_key_values)


@torch.no_grad()
def test_embeddings_name_no_latent_token():
    model, x = model_with(), text()
    x = torch.where(x == LATENT, LATENT + 1, x)
    embeddings = model.get_input_embeddings()(x)
    assert gap(model(inputs_embeds=embeddings).logits, model(x).logits) < 1e-12


@torch.no_grad()
def test_a_wrapped_model_changes_nowhere_but_at_thoughts():
    base = randomise(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).double()).eval()
    model, x = ut.wrap(base, time=ut.Coconut(LATENT)), text(latent=(6,))
    out, plain = model(x, schedule=ut.Jacobi(1)).logits, base(x).logits
    assert same(out[:, :6], plain[:, :6]) and gap(out[:, 6], plain[:, 6]) > 1e-3
    ordinary = text(latent=())
    assert_same(model(ordinary, schedule=ut.Jacobi(0)).logits, base(ordinary).logits)


EVERYWHERE = Case("gpt2", None, ut.Coconut())  # every position is marked: the last state is added to each embedding
CASES = [EVERYWHERE, Case("llama", ut.MiddleLoop(1, 2, 2), ut.Coconut())]
LEFT_OUT = {  # it is no identity where it is marked; at every position it does not contract, which the adjoint needs
    "row_1_identity_at_start",
    "row_8_saved_equals_loaded",
    "row_10_checkpointing_and_accumulation",
    "row_12_ten_steps_lower_the_loss",
}
ROWS = [name for name in dir(matrix) if name.startswith("row_") and name not in LEFT_OUT]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_matrix(row, case):
    getattr(matrix, row)(case)


def test_marked_rows_of_the_matrix(tmp_path):
    case = Case("gpt2", None, ut.Coconut(LATENT))
    assert bool((ids(2, matrix.T) == LATENT).any())
    matrix.row_3_cached_equals_full(case)
    matrix.row_5_causal(case)
    matrix.row_7_packed_equals_separate(case)
    matrix.row_8_saved_equals_loaded(case, tmp_path)
    matrix.row_9_generate(case)
    matrix.row_12_ten_steps_lower_the_loss(case)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.time == ut.Coconut(LATENT)


def test_checkpointing_and_accumulation():
    """Row 10 under the schedules that compute thoughts."""
    model, x = model_with(), torch.cat([text(), text(latent=(2, 8))])
    for schedule in (ut.Sequential(), ut.Jacobi(3), ut.Converge()):
        whole = gradients(model, model(x, labels=x, schedule=schedule).loss)
        model.gradient_checkpointing_enable()
        again = gradients(model, model(x, labels=x, schedule=schedule).loss)
        model.gradient_checkpointing_disable()
        assert gradient_gap(again, whole) < 1e-12
        rows = [model(r, labels=r, schedule=schedule, num_items_in_batch=x[:, 1:].numel()).loss for r in x.split(1)]
        parts = [gradients(model, loss) for loss in rows]
        assert gradient_gap({n: sum(p[n] for p in parts) for n in whole}, whole) < 1e-9


def test_token_must_be_an_id():
    for token in (-1, 1.5, True):
        with pytest.raises(ValueError, match="token"):
            ut.Coconut(token)
    assert V > LATENT
