"""Reuse maps: repetition, recurrent embeddings, other counts at evaluation; and ILR's GPT-2 variant."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import matrix
import undertow as ut
from matrix import Case, padded
from models import CONFIGS, build, gap, gradient_gap, gradients, ids
from rounding import assert_copied, assert_same

COUNTS = (2, 1, 3, 1)


class Nothing:
    """A cache that keeps nothing: each layer call sees its own keys and values only."""

    def update(self, k, v, *args):
        return k, v


def layers(model, x: torch.Tensor, visits: list[int], recurrent: bool = False) -> torch.Tensor:
    """Logits by calling Hugging Face's layers in this order; x + p before every repetition if `recurrent`."""
    view, T = model.view, x.shape[1]
    positions = torch.arange(T)[None]
    h = view.embed(x, None, positions)
    context = view.context(x, h, positions, 0)
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    before, entered = None, h
    for layer in visits:
        if layer != before:
            entered = h
        elif recurrent:
            h = h + entered
        h = view.layers[layer](h, **{view.family.cache: Nothing(), "attention_mask": mask}, **context)
        before = layer
    return view.head(view.final_norm(h))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("counts", [COUNTS, (3, 2, 1, 2)], ids=str)
def test_the_formula(counts, family, recurrent):
    """`x <- f_l(x)`, r_l times; with recurrent embeddings `x <- f_l(x + p)` from the second time on."""
    model, x = build(family, ut.ReuseMap(counts, recurrent)), ids()
    visits = [layer for layer, r in enumerate(counts) for _ in range(r)]
    mine, direct = model(x).logits, layers(model, x, visits, recurrent)
    w = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert gap(mine, direct) < 1e-9
    assert gradient_gap(gradients(model, (mine * w).sum()), gradients(model, (direct * w).sum())) < 1e-6
    assert gap(mine, layers(model, x, visits, not recurrent)) > 1e-3


@torch.no_grad()
def test_recurrent_retrofit_starts_without_it_and_learns_one_number():
    base = build("llama").backbone
    plain = ut.wrap(base, depth=ut.ReuseMap(COUNTS))
    model = ut.wrap(base, depth=ut.ReuseMap(COUNTS, recurrent=True))
    assert_same(model(ids()).logits, plain(ids()).logits)
    assert [n for n, _ in model.undertow.named_parameters()] == ["recur.scale"]
    model.undertow["recur"].scale.fill_(1.0)
    visits = [layer for layer, r in enumerate(COUNTS) for _ in range(r)]
    assert gap(model(ids()).logits, layers(model, ids(), visits, recurrent=True)) < 1e-9


ROWS = [
    matrix.row_2_executor_equals_references,
    matrix.row_3_cached_equals_full,
    matrix.row_4_padded_equals_single,
    matrix.row_7_packed_equals_separate,
    matrix.row_9_generate,
]


@pytest.mark.parametrize("time", [None, ut.T2MLR(1, 2)], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_recurrent_in_the_matrix(row, time):
    row(Case("llama", ut.ReuseMap(COUNTS, recurrent=True), time))


@pytest.mark.parametrize("recurrent", [False, True])
@torch.no_grad()
def test_other_counts_at_evaluation(recurrent):
    """A list gives the counts, a whole number gives all of them; the result is the model of those counts."""
    model = build("llama", ut.ReuseMap(COUNTS, recurrent))
    for loops, counts in (([1, 2, 1, 4], (1, 2, 1, 4)), (2, (2, 2, 2, 2)), (1, (1, 1, 1, 1))):
        visits = [layer for layer, r in enumerate(counts) for _ in range(r)]
        assert gap(model(ids(), loops=loops).logits, layers(model, ids(), visits, recurrent)) < 1e-9
    assert gap(model(ids(), loops=1).logits, model.backbone(ids()).logits) < 1e-9
    made = model.generate(ids()[:, :5], max_new_tokens=4, do_sample=False, loops=[1, 1, 2, 1])
    scored = layers(model, made, [0, 1, 2, 2, 3], recurrent)
    assert torch.equal(made[:, 5:], scored[:, 4:-1].argmax(-1))


@pytest.mark.parametrize(
    "loops, message",
    [
        ([1, 2], r"counts=\[1, 2\] has 2 entries: the model has 4 layers"),
        ([1, 0, 1, 1], r"ReuseMap counts=\(1, 0, 1, 1\): must be whole numbers of at least 1, one a layer"),
        (0, "must be whole numbers of at least 1"),
        (True, "must be whole numbers of at least 1"),
        ("2", "must be whole numbers of at least 1"),
    ],
)
def test_bad_counts_at_evaluation(loops, message):
    with pytest.raises(ValueError, match=message):
        build("llama", ut.ReuseMap(COUNTS))(ids(), loops=loops)


def test_recurrent_is_a_flag():
    with pytest.raises(ValueError, match="ReuseMap recurrent=1: must be True or False"):
        ut.ReuseMap(COUNTS, recurrent=1)


# ---------------------------------------------------------------------- GPT-2 as released: the first half loops


def test_gpt2_variant():
    """The first half of the layers `times` over, head and embedding apart: `MiddleLoop(0, L//2 - 1, times)`."""
    depth = ut.MiddleLoop(0, 4 // 2 - 1, 3)
    model, x = build("gpt2", depth, tie_word_embeddings=False), ids()
    mine, direct = model(x).logits, layers(model, x, [0, 1, 0, 1, 0, 1, 2, 3])
    w = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert gap(mine, direct) < 1e-12
    assert gradient_gap(gradients(model, (mine * w).sum()), gradients(model, (direct * w).sum())) < 1e-12
    each = build("gpt2", ut.ReuseMap([3, 3, 1, 1]), tie_word_embeddings=False)
    assert gap(each(x).logits, layers(each, x, [0, 0, 0, 1, 1, 1, 2, 3])) < 1e-12
    matrix.row_3_cached_equals_full(Case("gpt2", depth))


@torch.no_grad()
def test_an_untied_gpt2_head_stays_apart(tmp_path):
    """Apart in memory, when saved and loaded, and in what a change of the head does."""
    counts = {}
    for tied in (True, False):
        model = build("gpt2", ut.ReuseMap([2, 2, 1, 1]), tie_word_embeddings=tied)
        lm, x = model.backbone, ids()
        assert (lm.lm_head.weight is lm.transformer.wte.weight) == tied
        counts[tied] = model.num_parameters()
        model.save_pretrained(tmp_path / str(tied))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied), dtype=torch.float64).eval()
        assert_copied(loaded, model)
        assert_same(loaded(x).logits, model(x).logits)
        assert (loaded.backbone.lm_head.weight is loaded.backbone.transformer.wte.weight) == tied
    assert counts[False] - counts[True] == CONFIGS["gpt2"]().n_embd * CONFIGS["gpt2"]().vocab_size


@torch.no_grad()
def test_gpt2_generates_from_padded_rows():
    """The released variant has no cache and no pads."""
    model = build("gpt2", ut.ReuseMap([2, 2, 1, 1]))
    x, mask = padded(ids(2, 9), [0, 4])
    made = model.generate(x, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=1)
    alone = model.generate(x[1:, 4:], max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert torch.equal(made[1, 4:], alone[0])
