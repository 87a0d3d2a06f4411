"""What the page shows is what the model computes: compared with whole forwards and with the executor's definition."""

import pytest
import torch
from served import byte_tokenizer

import undertow as ut
from models import build, gap, ids
from rounding import same
from undertow.execute import Executor
from undertow.plan import NORM
from undertow.serve.look import legend, look, predicted, state, visits_of
from undertow.training.statistics import Statistics

MODELS = [
    (None, ut.T2MLR(1, 2, carry="residual")),
    (ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)),
    (ut.MiddleLoop(1, 2, 3, inject=True), None),
    (ut.TRMBlock(inner=2), None),
]


def looks(model, x_1T):
    found, cache = [], None
    for token in x_1T[0].tolist():
        seen, cache = look(model, token, cache)
        found.append(seen)
    return found


@pytest.mark.parametrize("depth, time", MODELS, ids=range(len(MODELS)))
def test_logits_and_memory_are_those_of_the_whole_forward(depth, time):
    model, x = build("gpt2", depth, time), ids(1, 6)
    out, found = model(x), looks(model, x)
    assert gap(torch.stack([seen.logits_V for seen in found]), out.logits[0]) < 1e-9
    if time is None:
        assert found[0].memory_ND is None
    else:
        memory = out.memory if out.memory.dim() == 4 else out.memory[:, :, None]
        assert gap(torch.stack([seen.memory_ND for seen in found]), memory[0]) < 1e-9
        assert torch.equal(found[3].entered_ND, found[2].memory_ND)
        assert not found[0].entered_ND.any()
    assert not any(module._forward_hooks for name, module in model.undertow.named_children())  # nothing stays behind


def test_the_last_visit_of_a_loop_predicts_what_the_model_does_without_a_coda():
    """And visits before it: a loop cut short, its final norm and head, on the same tokens."""
    model, x = build("gpt2", ut.BlockLoop(3)), ids(1, 5)
    seen = looks(model, x)[-1]
    assert gap(seen.lens_NV[-1], seen.logits_V) < 1e-12
    for rounds in (1, 2):
        shorter = build("gpt2", ut.BlockLoop(rounds))
        shorter.load_state_dict(model.state_dict())
        assert gap(seen.lens_NV[4 * rounds - 1], shorter(x).logits[0, -1]) < 1e-9


def test_lens_rows_are_hidden_states_read_out():
    """The definition: a plain backbone's own hidden states, each through its final norm and head."""
    model, x = build("gpt2"), ids(1, 5)
    hidden = model.backbone(x, output_hidden_states=True).hidden_states
    seen = looks(model, x)[-1]
    for i in range(3):  # Hugging Face gives the last one normed already
        read = model.backbone.lm_head(model.backbone.transformer.ln_f(hidden[i + 1][0, -1]))
        assert gap(seen.lens_NV[i], read) < 1e-9


def test_gates_and_norms_are_those_that_training_logs():
    model, x = build("llama", time=ut.T2MLR(1, 2)), ids(1, 1)
    watch = Statistics()
    watch.watch(model)
    model(x)
    logged = watch.take()
    seen = state(look(model, int(x), None)[0], model)["edges"][0]
    for name in ("m", "x"):
        assert seen["gates"][name] == pytest.approx(logged[f"gates/memory_mixer/gate_{name}_mean"], rel=1e-4)
    for name in ("x", "m", "out"):
        assert seen["norms"][name] == pytest.approx(logged[f"gates/memory_mixer/norm_{name}"], rel=1e-4, abs=1e-12)


def test_watching_changes_nothing():
    model, x = build("gpt2", ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)), ids(1, 4)
    before = Executor._visit, Executor._mix
    expected = model(x).logits
    looks(model, x)
    assert same(model(x).logits, expected) and before == (Executor._visit, Executor._mix)


def test_words_and_numbers():
    model, tokenizer = build("gpt2", ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2), vocab_size=257), byte_tokenizer()
    said = legend(model)
    assert said["visits"] == ["layer 0", "layer 1, pass 1", "layer 1, pass 2", "layer 2", "layer 3"]
    assert said["memories"] == ["layer 2"] and said["edges"][0] == {"name": "layer 0: input", "from": "2", "delay": 1}
    x = ids(1, 3)
    seen = looks(model, x)[-1]
    rows, inside = predicted(seen, tokenizer, 7), state(seen, model)
    assert len(rows) == len(said["visits"]) == len(visits_of(model.program))
    assert len(inside["edges"]) == len(said["edges"]) and len(inside["memories"]) == 1
    p = model(x).logits[0, -1].detach().softmax(-1)
    assert rows[-1]["top"][0][0] == tokenizer.decode([int(p.argmax())])
    assert rows[-1]["top"][0][1] == pytest.approx(float(p.max()), rel=1e-4)
    assert rows[-1]["chosen"] == pytest.approx(float(p[7]), rel=1e-4)
    trm = build("gpt2", ut.TRMBlock(inner=2))
    assert len(legend(trm)["visits"]) == sum(step.block != NORM for step in trm.program.steps)
