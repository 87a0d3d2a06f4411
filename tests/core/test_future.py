"""Future-token heads: which token each predicts from which state, and what trains with them."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import undertow as ut
from models import CONFIGS, V, build, gap, ids, randomise
from rounding import assert_copied, assert_same
from undertow.future import FutureHeads
from undertow.model import UndertowConfig, UndertowForCausalLM
from undertow.plan import each_layer_once

T = 12
FUTURE = {"heads": 3, "layers": 2, "source": 1, "weights": [1.0, 2.0, 0.5], "trunk": 0.25}


def with_heads(family="gpt2", depth=None, time=None, **future):
    torch.manual_seed(0)
    model = ut.from_scratch(CONFIGS[family](), depth=depth, time=time, future=FUTURE | future)
    return randomise(model.double()).eval()


def state_after(model, x, layer):
    """What the layer's last visit leaves, read by a hook: the last call is the last visit of the last sweep."""
    seen = []
    hook = model.view.layers[layer].register_forward_hook(lambda module, args, out: seen.append(out))
    out = model(x, schedule=ut.Jacobi(T))
    hook.remove()
    return seen[-1], out


@pytest.mark.parametrize(
    "depth, time", [(None, None), (None, ut.T2MLR(1, 2)), (ut.ReuseMap([1, 3, 1, 1]), None), (None, ut.LRT(0))], ids=str
)
@pytest.mark.parametrize("source", [1, -1, 0])
def test_losses_by_hand(depth, time, source):
    model, x = with_heads(depth=depth, time=time, source=source), ids(2, T)
    labels = x.clone()
    labels[0, :4] = -100
    h, _ = state_after(model, x, source % 4)
    out = model(x, labels=labels, schedule=ut.Jacobi(T))
    expected = []
    for j, head in enumerate(model.undertow["future"].heads):
        z = F.linear(h, head[0].weight, head[0].bias)
        logits = F.linear(z * torch.sigmoid(z), head[2].weight, head[2].bias)
        nats = -torch.log_softmax(logits, -1)
        wanted = [(b, t) for b in range(2) for t in range(T - 2 - j) if labels[b, t + 2 + j] != -100]
        expected.append(sum(nats[b, t, labels[b, t + 2 + j]] for b, t in wanted) / len(wanted))
    expected = torch.stack(expected)
    torch.testing.assert_close(out.future_losses, expected, rtol=1e-10, atol=1e-10)
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    together = (expected * expected.new_tensor([1, 2, 0.5])).sum() / 3.5
    torch.testing.assert_close(out.loss, 0.25 * plain + together, rtol=1e-10, atol=1e-10)


def test_accumulation_equals_one_batch():
    model, x = with_heads(time=ut.T2MLR(1, 2)), ids(4, T)
    n = (x[:, 1:] != -100).sum()
    whole = model(x, labels=x, num_items_in_batch=n).loss
    parts = sum(model(x[i : i + 1], labels=x[i : i + 1], num_items_in_batch=n).loss for i in range(4))
    torch.testing.assert_close(parts, whole)


def test_saved_equals_loaded(tmp_path):
    model, x = with_heads(time=ut.LRT(2)), ids(2, T)
    model.save_pretrained(tmp_path)
    loaded = UndertowForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_copied(loaded, model)
    assert_same(loaded(x, labels=x).future_losses, model(x, labels=x).future_losses)
    assert loaded.config.future == FUTURE


def test_heads_change_no_logit_and_wrap_takes_them_too():
    x = ids(2, T)
    base = build("gpt2").backbone
    with_them = ut.wrap(base, time=ut.T2MLR(1, 2), future=FUTURE)
    assert gap(with_them(x).logits, base(x).logits) < 1e-12
    assert with_them(x).future_losses is None  # no labels: no heads are run


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"heads": 0}, "future heads=0"),
        ({"layers": 0}, "future layers=0"),
        ({"weights": [1.0]}, "must be 3 non-negative numbers"),
        ({"source": 9}, "future source=9"),
        ({"colour": 1}, "future has no field 'colour'; allowed are"),
    ],
)
def test_bad_settings_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        with_heads(**wrong)
    assert "\n" not in str(error.value)


def test_short_rows_have_no_label_for_far_heads():
    model, x = with_heads(), ids(2, 3)
    losses = model(x, labels=x).future_losses
    assert losses[0] > 0 and losses[1] == losses[2] == 0 and losses.isfinite().all()


def test_parameter_count():
    heads = FutureHeads(8, V, heads=4, layers=1)
    assert sum(p.numel() for p in heads.parameters()) == 4 * (8 * V + V)
    assert len(each_layer_once(4)) == 4 and UndertowConfig().future is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_vocabulary_reaches_the_heads(tied, tmp_path):
    torch.manual_seed(0)
    hf = CONFIGS["llama"]()
    hf.tie_word_embeddings = tied
    model = ut.from_scratch(hf, time=ut.LRT(1), future=FUTURE).double()
    x = ids(2, T)
    before = model(x, labels=x).future_losses.detach()
    model.resize_token_embeddings(V + 5, pad_to_multiple_of=8, mean_resizing=False)
    assert {head[-1].out_features for head in model.undertow["future"].heads} == {48}
    after = model(x, labels=x).future_losses.detach()
    assert gap(after, before) < 0.2  # small weights at new tokens change the others' probabilities a little
    x[0, 3] = V + 2
    model(x, labels=x).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert gap(loaded.double()(x, labels=x).future_losses, model.eval()(x, labels=x).future_losses) < 1e-12
    model.resize_token_embeddings(V - 3)
    assert model(ids(2, T) % 40, labels=ids(2, T) % 40).loss.isfinite()


def test_evaluation_hands_on_logits_alone(tmp_path):
    """Hugging Face's trainer gathers everything that the config does not name as of no interest."""
    seen, data = [], [{"input_ids": row, "labels": row} for row in ids(4, T)]
    for model in (with_heads(), build("gpt2", ut.ReuseMap([1, 2, 1, 1])), build("gpt2", time=ut.T2MLR(1, 2))):
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        take = lambda found: seen.append(found.predictions) or {}  # noqa: E731
        Trainer(model, args, eval_dataset=data, compute_metrics=take).evaluate()
        assert seen[-1].shape == (4, T, V)
