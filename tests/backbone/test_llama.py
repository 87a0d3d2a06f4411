"""Our Llama: six position encodings and what ILR adds to a layer, against dense formulas and in the matrix."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import matrix
import models
import undertow as ut
from dense import causal, dense
from matrix import Case, padded
from models import build, gap, gradient_gap, gradients, ids, randomise
from rounding import assert_copied, assert_same
from undertow.analysis import flops
from undertow.backbone import UndertowLlamaConfig
from undertow.backbone.positions import POSITIONS
from undertow.versions import CACHE

FREE = [p for p in POSITIONS if p != "learned"]  # encodings without a longest text
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=models.V,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
TRAINED = 6  # `max_position_embeddings`: texts in these tests are longer
DEPTH, TIMES = ut.ReuseMap([2, 1, 1, 2]), (ut.T2MLR(1, 2), ut.LRT(2))
EXTRAS = {"head_scale": True, "adaptive_norm": [1], "loop_encoding": [1, 3, 1, 2]}


def config(position: str, **more) -> UndertowLlamaConfig:
    """Tiny, with grouped heads and small thresholds: a text of 11 goes beyond FIRE's, and CoPE's table is short."""
    longest = 96 if position == "learned" else TRAINED
    values = dict(SIZES, num_key_value_heads=2, max_position_embeddings=longest, fire_threshold=4.0)
    return UndertowLlamaConfig(position=position, **values | more)


@pytest.fixture
def using(monkeypatch):
    """Let `Case` and `build` of family undertow_llama use this config."""

    def use(position: str, **more):
        monkeypatch.setitem(models.CONFIGS, "undertow_llama", partial(config, position, **more))

    return use


def model(position: str, depth=None, time=None, **more) -> ut.UndertowForCausalLM:
    torch.manual_seed(0)
    return randomise(ut.from_scratch(config(position, **more), depth=depth, time=time).double()).eval()


# ---------------------------------------------------------------------- the whole model against its formula


@pytest.mark.parametrize("more", [{}, EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("position", POSITIONS)
def test_logits_and_gradients_are_the_formula(position, more):
    counts, x = (1, 3, 1, 2), ids(2, 11)
    ours = model(position, ut.ReuseMap(counts), **more)
    mine, direct = ours(x).logits, dense(ours.backbone, x, counts)
    w = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert gap(mine, direct) < 1e-5  # Llama's norm computes in float32
    found, wanted = gradients(ours, (mine * w).sum()), gradients(ours, (direct * w).sum())
    assert gradient_gap(found, wanted) < 1e-5
    for name, gradient in wanted.items():  # the small ones one by one: position, head scale, loop encoding
        if gradient.numel() < 400 and not name.endswith("out_bias"):  # which a softmax does not see
            assert float(gradient.abs().max()) > 1e-6, name
            assert gap(found[name], gradient) < 1e-3, name


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_documents_and_pads_are_the_formula(position):
    """Packed rows: attention stays in the document, positions begin anew. Pads: as if they were not there."""
    ours, x = model(position, ut.ReuseMap([2, 1, 1, 1])), ids(2, 11)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]])
    document = (position_ids == 0).cumsum(1)
    allowed = causal(11, 11) & (document[:, None, :, None] == document[:, None, None])
    expected = dense(ours.backbone, x, (2, 1, 1, 1), position_ids, allowed)
    assert gap(ours(x, position_ids=position_ids).logits, expected) < 1e-5
    x, mask = padded(x, [0, 3])
    alone = dense(ours.backbone, x[1:, 3:], (2, 1, 1, 1))
    assert gap(ours(x, attention_mask=mask).logits[1:, 3:], alone) < 1e-5


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_the_backbone_alone(position):
    """Its own Hugging Face forward and generate: the formula, padded, cached, and with embeddings for input."""
    lm, x = model(position).backbone, ids(2, 11)
    expected = dense(lm, x)
    assert gap(lm(x).logits, expected) < 1e-5
    assert gap(lm(inputs_embeds=lm.model.embed_tokens(x)).logits, expected) < 1e-5
    cache, parts = None, []
    for part in x.split([4, 3, 1, 1, 1, 1], 1):
        out = lm(part, **{CACHE: cache}, use_cache=True)
        cache, parts = out[CACHE], [*parts, out.logits]
    assert gap(torch.cat(parts, 1), expected) < 1e-5
    x, mask = padded(x, [0, 3])
    made = lm.generate(x, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=1)
    for b, n in enumerate([0, 3]):
        text = x[b : b + 1, n:]
        for _ in range(4):
            text = torch.cat([text, dense(lm, text)[:, -1:].argmax(-1)], 1)
        assert torch.equal(made[b : b + 1, n:], text)


@torch.no_grad()
def test_rope_alone_is_hugging_faces_llama():
    """The same weights under the same names give the same logits."""
    lm = model("rope").backbone
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    llama = llama.double().eval()
    llama.load_state_dict(lm.state_dict())
    assert_same(llama(ids(2, 11)).logits, lm(ids(2, 11)).logits)


@torch.no_grad()
def test_every_encoding_does_something():
    """Under `sdpa` the published alibi, cope and fire are silently no encoding at all; ours differ from each other."""
    found = {}
    for position in POSITIONS:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config(position)).double().eval()
        for name, p in lm.named_parameters():  # the same weights for all; the encoding's own away from their start
            generator = torch.Generator().manual_seed(len(name) + 31 * sum(map(ord, name)))
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + (p.dim() == 1))
        found[position] = lm(ids(2, 11)).logits
    for a in POSITIONS:
        assert all(gap(found[a], found[b]) > 1e-3 for b in POSITIONS if b != a), a


# ---------------------------------------------------------------------- sizes, starts, errors


def parameters(position: str, d=128, L=4, h=4, ffn=512, V=1024) -> int:
    values = dict(hidden_size=d, num_hidden_layers=L, num_attention_heads=h, intermediate_size=ffn, vocab_size=V)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            UndertowLlamaConfig(**values, position=position, max_position_embeddings=1024)
        )
    return lm.num_parameters()


@pytest.mark.parametrize(
    "position, count",
    [("nope", 1_180_800), ("rope", 1_180_800), ("alibi", 1_180_800), ("learned", 1_311_872), ("cope", 1_311_872),
     ("fire", 1_181_596)],
)  # fmt: skip
def test_published_parameter_counts_small(position, count):
    assert parameters(position) == count


@pytest.mark.parametrize("position, count", [("rope", 100_086_528), ("learned", 100_872_960)])
def test_published_parameter_counts_large(position, count):
    assert parameters(position, d=768, L=8, h=8, ffn=3072, V=32000) == count


def test_starts():
    """N(0, 0.02) for tables and matrices, zeros for CoPE, 1.6 for head scales, c = 0.1, a = 1, L0 = 512."""
    values = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    small = partial(UndertowLlamaConfig, **values, max_position_embeddings=300)
    learned = AutoModelForCausalLM.from_config(small(position="learned"))
    assert 0.0195 < float(learned.model.embed_positions.weight.detach().std()) < 0.0205
    cope = AutoModelForCausalLM.from_config(small(position="cope", head_scale=True, loop_encoding=[200, 1]))
    layer = cope.model.layers[0]
    assert not layer.self_attn.position.table_EP.any() and layer.self_attn.position.table_EP.shape == (32, 300)
    assert torch.equal(layer.self_attn.head_scale.detach(), torch.full((4,), 1.6))
    assert 0.0195 < float(layer.loop.input.weight.detach().std()) < 0.0205
    assert 0.017 < float(layer.loop.weight.weight.detach().std()) < 0.023
    assert cope.model.layers[1].loop is None
    fire = AutoModelForCausalLM.from_config(small(position="fire")).model.layers[1].self_attn.position
    assert [round(float(p.detach()), 6) for p in (fire.c, fire.a, fire.threshold)] == [0.1, 1.0, 512.0]
    assert 0.01 < float(fire.out_weight.detach().std()) < 0.03 and not fire.out_bias.any() and not fire.in_bias.any()
    assert all(p.requires_grad for p in fire.parameters())


def test_head_scale_stays_at_least_one_and_can_leave_the_bound():
    ours, x = model("nope", head_scale=True), ids(2, 7)
    scales = [layer.self_attn.head_scale for layer in ours.backbone.model.layers]
    with torch.no_grad():
        for s in scales:
            s.fill_(1.0)
    at_bound = ours(x).logits
    with torch.no_grad():
        for s in scales:
            s.fill_(0.4)
    below = ours(x).logits
    assert gap(below, at_bound) < 1e-12
    assert all(float(g.abs().min()) > 0 for g in torch.autograd.grad(below.square().sum(), scales))


@torch.no_grad()
def test_tying_is_respected():
    x = ids(2, 7)
    for tied in (True, False):
        ours = model("alibi", tie_word_embeddings=tied)
        lm = ours.backbone
        assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
        before = ours(x).logits
        lm.lm_head.weight[x[0, 0]] += torch.arange(32.0)
        changed = (ours(x).logits - before).abs().amax((0, 1)) > 1e-9
        assert int(changed.sum()) == (models.V if tied else 1)


@pytest.mark.parametrize("position", FREE)
@torch.no_grad()
def test_longer_than_in_training(position):
    """Cached decoding and generation beyond `max_position_embeddings` are the formula's."""
    ours, x = model(position, ut.ReuseMap([2, 1, 1, 2])), ids(2, 23)
    expected = dense(ours.backbone, x, (2, 1, 1, 2))
    cache, parts = None, []
    for part in x.split([4, 9, *[1] * 10], 1):
        out = ours(part, **{CACHE: cache}, use_cache=True)
        cache, parts = out[CACHE], [*parts, out.logits]
    assert gap(torch.cat(parts, 1), expected) < 1e-5
    made = ours.generate(x[:, :4], max_new_tokens=12, do_sample=False)
    assert torch.equal(made[:, 4:], dense(ours.backbone, made, (2, 1, 1, 2))[:, 3:-1].argmax(-1))


def test_a_learned_table_ends():
    ours, x = model("learned", max_position_embeddings=8), ids(2, 11)
    for run in (ours, ours.backbone):
        run(x[:, :8])
        with pytest.raises(ValueError, match="11 positions: the .*learned position table has 8"):
            run(x)
        cache = run(x[:, :6], use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="9 positions"):
            run(x[:, 6:9], **{CACHE: cache})


def test_a_repetition_without_encoding():
    ours = model("rope", ut.ReuseMap([1, 2, 1, 1]), loop_encoding=[1, 2, 1, 1])
    ours(ids())
    ours(ids(), loops=[3, 2, 1, 1])  # layer 0 has no loop encoding, so it may repeat
    with pytest.raises(ValueError, match="layer 1: its loop encoding has 2 repetitions, and this is number 3"):
        ours(ids(), loops=[1, 3, 1, 1])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"position": "ape"}, "position='ape': allowed are nope, rope, learned, alibi, cope, fire"),
        ({"position": "fire", "attention_dropout": 0.1}, "attention_dropout=0.1: must be 0 with position='fire'"),
        ({"adaptive_norm": [0, 4]}, "adaptive_norm has layer 4: the model has layers 0..3"),
        ({"loop_encoding": [2, 1]}, r"loop_encoding=\[2, 1\]: must be 4 counts of at least 1"),
        ({"loop_encoding": [2, 1, 0, 1]}, r"loop_encoding=\[2, 1, 0, 1\]: must be 4 counts of at least 1"),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(ValueError, match=message):
        UndertowLlamaConfig(**{**SIZES, **values})


def test_another_attention_is_refused():
    values = {**SIZES, "attn_implementation": "eager"}
    lm = AutoModelForCausalLM.from_config(UndertowLlamaConfig(**values, position="alibi"))
    with pytest.raises(ValueError, match="attn_implementation='eager': only 'sdpa' is supported"):
        lm(ids())
    with pytest.raises(ValueError, match="attn_implementation='eager': only 'sdpa' is supported"):
        ut.wrap(lm)


@torch.no_grad()
def test_saved_and_loaded_alone(tmp_path):
    for position in POSITIONS:
        lm = model(position, **EXTRAS).backbone
        lm.save_pretrained(tmp_path / position)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / position, dtype=torch.float64).eval()
        assert_copied(loaded, lm)
        assert_same(loaded(ids()).logits, lm(ids()).logits)
        assert AutoConfig.from_pretrained(tmp_path / position).position == position


def test_half_precision_trains():
    """bfloat16 by autocast: gradients close to the float32 ones, for every encoding."""
    for position in POSITIONS:
        torch.manual_seed(0)
        ours, x = ut.from_scratch(config(position, **EXTRAS), depth=ut.ReuseMap([2, 1, 1, 2])), ids(2, 11)
        exact = gradients(ours, ours(x, labels=x).loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ours(x, labels=x).loss
        assert gradient_gap(gradients(ours, loss), exact) < 0.05, position


# ---------------------------------------------------------------------- costs


def count(call) -> tuple[int, object]:
    """FLOPs of `call()` as torch counts them, and its result."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("longest", [64, 5])
@pytest.mark.parametrize("time", [None, *TIMES], ids=str)
def test_flops_of_cope(time, longest, using):
    """The formula knows the table, long or short: what torch counts of training, prefill and a decoded token."""
    using("cope", max_position_embeddings=longest)
    ours, x = ut.from_scratch(models.CONFIGS["undertow_llama"](), depth=DEPTH, time=time), ids(2, 12)
    for schedule in (ut.Cyclic(3, 1), ut.Jacobi(2, backward=1)):
        counted, _ = count(lambda s=schedule: ours(x, labels=x, schedule=s).loss.backward())
        assert flops.training_flops(ours, 12, schedule, batch=2) == counted
    with torch.no_grad():
        counted, out = count(lambda: ours(x[:1], schedule=ut.Cyclic(3, 1), logits_to_keep=1, use_cache=True))
        assert flops.prefill_flops(ours, 12, ut.Cyclic(3, 1)) == counted
        counted, _ = count(lambda: ours(x[:1, :1], **{CACHE: out[CACHE]}, logits_to_keep=1))
        assert flops.decode_flops(ours, 12) == counted


def test_flops_of_fire_are_all_but_its_mlp(using):
    using("fire", fire_threshold=512.0)
    ours, x = ut.from_scratch(models.CONFIGS["undertow_llama"](), depth=DEPTH), ids(2, 12)
    counted, _ = count(lambda: ours(x, labels=x).loss.backward())
    out, hidden = 3 * 2 * 12 * 32 * 4, 3 * 2 * 12 * 32  # forward and gradients: 12 distances, 32 hidden, 4 heads
    assert counted - flops.training_flops(ours, 12, batch=2) == 4 * (out + hidden)  # once a layer, not a visit


# ---------------------------------------------------------------------- the matrix

ROWS = [row for name, row in matrix.ROWS.items() if name != "row_8_saved_equals_loaded"]
CASES = [Case("undertow_llama", DEPTH, None), *(Case("undertow_llama", DEPTH, time) for time in TIMES)]
ALL = [
    pytest.param(row, position, case, marks=() if position in ("alibi", "cope", "fire") else pytest.mark.slow)
    for row in ROWS
    for position in POSITIONS
    for case in CASES
]


@pytest.mark.parametrize("row, position, case", ALL)
def test_matrix(row, position, case, using):
    using(position)
    row(case)


@pytest.mark.parametrize("position", POSITIONS)
def test_saved_equals_loaded(position, using, tmp_path):
    using(position, head_scale=True, adaptive_norm=[0, 3], loop_encoding=[2, 1, 1, 2])
    matrix.row_8_saved_equals_loaded(CASES[1], tmp_path)


@pytest.mark.parametrize("row", ROWS[:6], ids=lambda row: row.__name__)
def test_matrix_with_everything_on(row, using):
    using("fire", head_scale=True, adaptive_norm=[0, 3], loop_encoding=[2, 1, 1, 2])
    row(CASES[1])


@pytest.mark.parametrize("position", ["cope", "fire"])
def test_accumulation_under_an_exact_adjoint(position, using):
    using(position)
    ours, x = build("undertow_llama", DEPTH, ut.LRT(2)), ids(4)
    schedule, count = ut.Cyclic(4, 3, adjoint=3, solve="cyclic"), torch.tensor(4 * 10)
    whole = gradients(ours, ours(x, labels=x, schedule=schedule).loss)
    parts = [
        gradients(ours, ours(row, labels=row, schedule=schedule, num_items_in_batch=count).loss) for row in x.split(1)
    ]
    assert gradient_gap({n: sum(p[n] for p in parts) for n in whole}, whole) < 1e-12


@torch.no_grad()
def test_repetition_numbers_reach_every_schedule(using):
    """A layer's second repetition reads its second encoding, cached and in sweeps over subsets too."""
    using("rope", loop_encoding=[2, 1, 1, 2])
    ours, x = build("undertow_llama", ut.ReuseMap([2, 1, 1, 2])), ids()
    before = ours(x).logits
    for layer in (0, 3):
        ours.backbone.model.layers[layer].loop.input.weight[1] += 1
        assert gap(ours(x).logits, before) > 1e-3
        before = ours(x).logits
