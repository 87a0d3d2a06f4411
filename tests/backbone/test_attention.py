"""Every attention implementation computes what sdpa computes, in every kind of call."""

import copy
import warnings

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, modeling_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import undertow as ut
from models import TOLERANCE, build, gap, gradient_gap, gradients, ids
from undertow import reference
from undertow.backbone.attention import attend
from undertow.recipe import Recipe, RecipeError
from undertow.training.run import build_model
from undertow.versions import CACHE

METHODS = {"t2mlr": dict(time=ut.T2MLR(1, 2)), "lrt": dict(time=ut.LRT(2)), "trm": dict(depth=ut.TRMBlock(layers=1))}
SCHEDULES = [ut.Cyclic(3, 2), ut.Jacobi(2), ut.Interleaved(2), ut.Sequential()]  # every other one with pads
ADJOINT = [ut.Cyclic(4, 3, adjoint=2)]
ROWS = [("llama", "t2mlr"), ("mistral", "lrt"), ("llama", "trm"), ("gpt2", "lrt"), ("gpt_neox", "lrt")]


def rows(quick, families=("llama", "mistral", "gpt2", "gpt_neox")):
    """A test of every row; those after the first `quick` ones are slow."""
    chosen = [row for row in ROWS if row[0] in families]
    marked = [pytest.param(*row, marks=[pytest.mark.slow] * (i >= quick)) for i, row in enumerate(chosen)]
    return pytest.mark.parametrize(("family", "method"), marked)


def pair(family, method, name, **config):
    """The same model under sdpa and under another attention."""
    model = build(family, **METHODS[method], **config)
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    assert other.backbone.config._attn_implementation == name
    return model, other


def padded(T=11):
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, :4] = 0
    return mask


def both(family, models, more=(), labels=True):
    """Outputs (and gradients) of two models under every schedule agree; yields before each."""
    x = ids()
    for i, schedule in enumerate([*SCHEDULES, *more]):
        given = {"attention_mask": padded()} if i % 2 else {}
        yield
        outs = [m(x, labels=x if labels else None, schedule=schedule, **given) for m in models]
        assert gap(outs[1].logits, outs[0].logits) < TOLERANCE[family], schedule
        if labels:
            found = [gradients(m, out.loss) for m, out in zip(models, outs, strict=True)]
            assert gradient_gap(found[1], found[0]) < 10 * TOLERANCE[family], schedule


@pytest.fixture(scope="module")
def flash():
    """An attention without masks, in place of one that needs a GPU; the calls it got, as (queries, keys)."""
    calls = []

    def attention(module, query, key, value, attention_mask, **keywords):
        assert attention_mask is None
        S, K = query.shape[2], key.shape[2]
        calls.append((S, K))
        causal = torch.ones(S, K, dtype=torch.bool).tril(K - S)  # the last query sees the last key
        return sdpa_attention_forward(module, query, key, value, causal[None, None].expand(len(query), 1, S, K))

    AttentionInterface.register("flash_in_test", attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *given, **more: None)
        yield calls


@pytest.fixture
def uncompiled():
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


@rows(quick=2)
def test_eager_is_sdpa(family, method):
    for _ in both(family, pair(family, method, "eager"), ADJOINT):
        pass


@torch.no_grad()
@rows(quick=0, families=("llama", "mistral", "gpt_neox"))  # Hugging Face's GPT-2 has no flex attention
def test_flex_is_sdpa(family, method, uncompiled):
    for _ in both(family, pair(family, method, "flex_attention"), labels=False):
        pass


def test_flex_has_no_gradient_here(uncompiled):
    """torch's own limit; should it fall, ours goes too."""
    model, x = pair("llama", "t2mlr", "flex_attention")[1], ids()
    with torch.no_grad():
        model(x, labels=x, schedule=ut.Jacobi(0))
    with pytest.raises(ValueError, match="no gradient on CPU"):
        model(x, labels=x, schedule=ut.Jacobi(0))
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(q, q, q)


@rows(quick=2)
def test_flash_runs_where_there_is_no_mask_and_sdpa_elsewhere(family, method, flash, recwarn):
    T, whole = 11, []
    flash.clear()
    for _ in both(family, pair(family, method, "flash_in_test"), ADJOINT):
        whole.append((T, T) in flash)
        assert all(S == K == T or S == 1 for S, K in flash)
        flash.clear()
    if family == "mistral":  # a window of 5: whole sweeps have a mask
        assert not any(whole)
    else:  # `both` yields before it computes: schedules 0, 2 and 4 have no pads
        assert whole[1] and whole[3] and not (whole[2] or whole[4])
    said = {str(w.message) for w in recwarn if "takes no masks" in str(w.message)}
    assert len(said) == 1 and "\n" not in said.pop()


def decodes(family, method, name):
    """A prompt in pieces, then token by token: our loop, Hugging Face's, with and without pads at the left."""
    model, other = pair(family, method, name)
    x, more = ids(2, 9), dict(max_new_tokens=4, do_sample=False, pad_token_id=1)
    for mask in (torch.ones(2, 9, dtype=torch.long), padded(9)):
        for beams in (1, 2):
            texts = [m.generate(x, attention_mask=mask, num_beams=beams, **more) for m in (model, other)]
            assert torch.equal(*texts)
    cache, logits = None, []
    for part in (slice(0, 4), slice(4, 8), slice(8, 9)):
        out = other(x[:, part], **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        logits.append(out.logits)
    assert gap(torch.cat(logits, 1), model(x).logits) < 10 * TOLERANCE[family]


@torch.no_grad()
@rows(quick=1)
def test_eager_decodes_with_a_cache(family, method):
    decodes(family, method, "eager")


@torch.no_grad()
@rows(quick=0, families=("llama", "mistral", "gpt_neox"))
def test_flex_decodes_with_a_cache(family, method, uncompiled):
    decodes(family, method, "flex_attention")


@torch.no_grad()
@rows(quick=2)
@pytest.mark.filterwarnings("ignore:attn_implementation='flash_in_test'")
def test_flash_decodes_with_a_cache(family, method, flash):
    """Prefills from an empty cache and single tokens run it; a second piece of a prompt does not."""
    flash.clear()
    decodes(family, method, "flash_in_test")
    assert any(S == 1 < K for S, K in flash) and all(S == 1 or S == K for S, K in flash)


@torch.no_grad()
def test_the_definition_runs_under_any_of_them(uncompiled):
    model, other = pair("mistral", "t2mlr", "eager")
    assert gap(reference.recur(other, ids())[0], reference.recur(model, ids())[0]) < 1e-5


@torch.no_grad()
def test_it_is_chosen_at_loading_and_not_saved(tmp_path):
    model, other = pair("llama", "t2mlr", "eager")
    other.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    for name in ("sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.backbone.config._attn_implementation == name
        assert gap(loaded.eval()(ids()).logits, model(ids()).logits) < 1e-5
    assert AutoModelForCausalLM.from_pretrained(tmp_path).backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["undertow_llama", "undertow_nanochat"])
def test_ours_is_sdpa_alone(family):
    with pytest.raises(ValueError, match="'eager': only 'sdpa' is supported"):
        build(family).set_attn_implementation("eager")


def test_an_unknown_one_is_refused():
    AttentionInterface.register("something_else", sdpa_attention_forward)
    with pytest.raises(ValueError, match="'something_else': allowed are 'sdpa', 'eager'"):
        build("llama").set_attn_implementation("something_else")


def recipe(name):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    data = {"source": "stdlib", "seq_len": 16, "vocab_size": 300}
    backbone = {"family": "llama", **sizes, "attn_implementation": name}
    return Recipe.parse({"name": "a", "backbone": backbone, "data": data, "training": {"max_steps": 1}})


def test_a_recipe_chooses_it():
    model = build_model(recipe("eager"))
    attend(model, None)
    assert model.backbone.config._attn_implementation == "sdpa"
    attend(model, recipe("eager").backbone.attn_implementation)
    assert model.backbone.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="^backbone.attn_implementation: .*[Ff]lash") as raised:
        attend(model, "flash_attention_2")  # its package is not there
    assert "\n" not in str(raised.value)
    with pytest.raises(RecipeError, match="backbone.attn_implementation: 'egaer' is not known; did you mean 'eager'"):
        recipe("egaer")
    assert recipe("kernels-community/flash-attn2").backbone.attn_implementation
