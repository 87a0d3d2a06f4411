"""`skip_logits`: the same loss and gradient without ever holding all logits."""

import warnings

import pytest
import torch

import undertow as ut
from models import build, gap, gradient_gap, gradients, ids
from undertow import reference
from undertow.analysis.counts import peak_bytes
from undertow.loss import share

CASES = [
    ("llama", None, None, ut.Converge()),
    ("llama", None, ut.LRT(), ut.Interleaved(3)),
    ("gpt2", None, ut.T2MLR(1, 2), ut.Jacobi(2, loss=(0.1, 0.3, 0.6))),
    ("gpt_neox", ut.BlockLoop(2), ut.T2MLR(1, 2), ut.Cyclic(4, 3, adjoint=3, solve="cyclic")),
]


@pytest.mark.parametrize("family, depth, time, schedule", CASES, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_are_those_of_whole_logits(family, depth, time, schedule, tied):
    model, x = build(family, depth, time, tie_word_embeddings=tied), ids(3, 11)
    labels = x.clone()
    labels[0, :5] = -100
    for count in (None, 7):
        asked = dict(labels=labels, schedule=schedule, num_items_in_batch=count)
        whole = model(x, **asked)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            ours = model(x, skip_logits=True, **asked)
        assert ours.logits is None and whole.logits is not None
        assert gap(ours.loss, whole.loss) < 1e-12 and gap(ours.sweep_losses, whole.sweep_losses) < 1e-12
        assert gradient_gap(gradients(model, ours.loss), gradients(model, whole.loss)) < 1e-12


def test_no_label_is_no_loss():
    model, x = build("llama"), ids()
    out = model(x, labels=torch.full_like(x, -100), skip_logits=True)
    assert float(out.loss.detach()) == 0 and not any(g.any() for g in gradients(model, out.loss).values())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: None, None),
        (lambda m: m.bfloat16(), "bfloat16"),
        (lambda m: m.get_output_embeddings().register_forward_hook(lambda *_: None), "hooks"),
    ],
)
def test_a_head_that_is_no_plain_map_says_so(change, said):
    model, x = build("llama", None, ut.T2MLR(1, 2)), ids()
    change(model)
    whole = model(x, labels=x).loss
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = model(x, labels=x, skip_logits=True)
    told = [str(w.message) for w in seen if "skip_logits" in str(w.message)]
    assert out.logits is None and gap(out.loss, whole) < 1e-12
    assert [said in line for line in told] == ([] if said is None else [True])


def test_capped_logits_are_made():
    model, x = build("undertow_nanochat", None, ut.LRT()), ids()
    with pytest.warns(UserWarning, match="capped at 4"):
        loss = model(x, labels=x, skip_logits=True, schedule=ut.Interleaved(2)).loss
    assert gap(loss, model(x, labels=x, schedule=ut.Interleaved(2)).loss) < 1e-12


def test_it_holds_fewer_bytes():
    """Counted: three read-outs of 512 positions over 8,192 tokens, in float32."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=8192
    )
    model = ut.from_scratch(config, time=ut.LRT()).train()
    x = torch.randint(8192, (2, 256))

    def step(skip: bool):
        return lambda: model(x, labels=x, schedule=ut.Interleaved(2), skip_logits=skip).loss.backward()

    assert peak_bytes(step(True)) < 0.5 * peak_bytes(step(False))


# ---------------------------------------------------------------------- the mean over sweeps


SUBSETS = [ut.Interleaved(2), ut.Interleaved(3, refresh=True), ut.Interleaved(4, loss=(1, 0, 2, 0, 5))]


@pytest.mark.parametrize("schedule", [*SUBSETS, ut.Jacobi(2, loss="mean")], ids=str)
@pytest.mark.parametrize("T", [7, 8])
def test_a_sweep_counts_its_own_targets(schedule, T):
    """Each sweep's loss is torch's mean over the targets at its positions, and the whole their weighted mean."""
    model, x = build("gpt2", None, ut.LRT()), ids(2, T)
    out = model(x, labels=x, schedule=schedule)
    parts = reference.sweep(model, schedule, x)[1]
    targets = torch.nn.functional.pad(x[:, 1:], (0, 1), value=-100)
    means = [
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, rows].flatten()) for logits, rows, _ in parts
    ]
    assert gap(out.sweep_losses, torch.stack(means)) < 1e-11
    weights = schedule.loss if isinstance(schedule.loss, tuple) else [1] * len(means)
    assert gap(out.loss, sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)) < 1e-11


@pytest.mark.parametrize("schedule", SUBSETS, ids=str)
def test_micro_batches_add_up_whatever_is_masked(schedule):
    """Of unequal masks too: N is the batch's, and nothing else is counted."""
    model, x = build("gpt2", None, ut.LRT()), ids(4, 8)
    labels = x.clone()
    labels[0, ::2], labels[1, 1:], labels[2, :5] = -100, -100, -100
    whole = model(x, labels=labels, schedule=schedule)
    N = (labels[:, 1:] != -100).sum()
    parts = [
        model(x[rows], labels=labels[rows], schedule=schedule, num_items_in_batch=N) for rows in ([0], [1], [2, 3])
    ]
    assert gap(sum(part.loss for part in parts), whole.loss) < 1e-12
    mine, theirs = gradients(model, sum(part.loss for part in parts)), gradients(model, whole.loss)
    assert gradient_gap(mine, theirs) < 1e-12


def test_positions_without_a_target_have_no_loss():
    """The last position alone is a subset of `Interleaved(T)`, and all there is of one token."""
    model = build("gpt2", None, ut.LRT())
    out = model(ids(2, 4), labels=ids(2, 4), schedule=ut.Interleaved(4))
    assert torch.isfinite(out.sweep_losses).all() and float(out.sweep_losses.detach()[-1]) == 0
    assert float(model(ids(2, 1), labels=ids(2, 1)).loss.detach()) == 0
    assert [share(range(i, 4, 2), 4) for i in (0, 1)] == [2 / 3, 1 / 3] and share(range(3, 4), 4) == 0
