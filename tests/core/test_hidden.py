"""`output_hidden_states`: Hugging Face's own where layers run once, one entry a visit elsewhere."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import undertow as ut
from models import CONFIGS, build, gap, gradients, ids, randomise

SCHEDULES = (None, ut.Jacobi(0), ut.Jacobi(2), ut.Sequential(), ut.Cyclic(4, 2), ut.Interleaved(2), ut.Chunked(4))
THEIRS = [family for family in CONFIGS if not family.startswith("undertow")]


@torch.no_grad()
@pytest.mark.parametrize("family", THEIRS)
def test_of_an_identity_they_are_the_plain_models(family):
    base = randomise(AutoModelForCausalLM.from_config(CONFIGS[family]()).double()).eval()
    model, x = ut.wrap(copy.deepcopy(base), time=ut.T2MLR(1, 2)).eval(), ids()
    wanted = base(x, output_hidden_states=True).hidden_states
    for schedule in SCHEDULES if family == "gpt2" else (ut.Cyclic(4, 1),):
        out = model(x, output_hidden_states=True, schedule=schedule)
        assert len(out.hidden_states) == len(wanted)
        assert max(gap(a, b) for a, b in zip(out.hidden_states, wanted, strict=True)) < 1e-12, schedule
    assert model(x).hidden_states is None


def test_one_a_visit_and_the_last_one_is_what_the_head_reads():
    model, x = build(depth=ut.ReuseMap([1, 3, 1, 1]), time=ut.LRT(2)), ids()
    for schedule in (None, ut.Jacobi(2), ut.Interleaved(2)):
        out = model(x, output_hidden_states=True, schedule=schedule)
        assert len(out.hidden_states) == 1 + 6
        assert gap(model.get_output_embeddings()(out.hidden_states[-1]), out.logits) < 1e-12
    with_labels = model(x, labels=x, output_hidden_states=True, schedule=ut.Jacobi(0)).hidden_states
    without = model(x, output_hidden_states=True, schedule=ut.Jacobi(0)).hidden_states
    assert max(gap(a, b) for a, b in zip(with_labels, without, strict=True)) < 1e-12
    first = gradients(model, without[1].sum())
    assert float(first["backbone.model.layers.0.mlp.up_proj.weight"].norm()) > 0
    assert float(first["backbone.model.layers.1.mlp.up_proj.weight"].norm()) == 0


@torch.no_grad()
def test_with_a_cache_and_in_generation():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids()
    whole = model(x, output_hidden_states=True).hidden_states
    past = model(x[:, :6]).past_key_values
    rest = model(x[:, 6:], past_key_values=past, output_hidden_states=True).hidden_states
    assert max(gap(b, a[:, 6:]) for a, b in zip(whole, rest, strict=True)) < 1e-12
    out = model.generate(
        x, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )  # fmt: skip
    first = zip(out.hidden_states[0], whole, strict=True)
    assert len(out.hidden_states) == 3 and max(gap(a, b) for a, b in first) < 1e-12
    again = model(out.sequences[:, :-1], output_hidden_states=True).hidden_states[-1]
    assert gap(out.hidden_states[-1][-1], again[:, -1:]) < 1e-12


def test_from_the_config_as_a_tuple_and_what_is_not_to_be_had():
    model, x = build(time=ut.LRT(2)), ids()
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == 5
    logits, _, states, *_ = model(x, return_dict=False)
    assert len(states) == 5 and gap(model.get_output_embeddings()(states[-1]), logits) < 1e-12
    model.config.return_dict = False
    assert isinstance(model(x), tuple) and not isinstance(model(x, return_dict=True), tuple)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model.generate(x, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)
    looped = build(depth=ut.BlockLoop(2))
    with pytest.raises(ValueError, match="exit_rule"):
        looped(x, exit_rule=ut.Exit("fixed", 1), output_hidden_states=True)
