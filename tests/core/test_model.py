"""The model as Hugging Face tools see it."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import undertow as ut
from matrix import T
from models import CONFIGS, LAYERS, V, build, gap, gradients, ids
from rounding import assert_copied, assert_same


def test_published_names_are_there():
    for name in ("wrap", "from_scratch", "T2MLR", "LRT", "ReuseMap", "TRMBlock", "BlockLoop", "MiddleLoop", "Converge"):
        assert name in dir(ut) and getattr(ut, name)
    with pytest.raises(AttributeError):
        ut.nothing  # noqa: B018


def test_default_schedules():
    """Training: the method's; evaluation: the exact one; an argument overrides either."""
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, T)
    assert model.schedule == ut.Cyclic(8, 3, adjoint=4)
    assert_same(model(x).logits, model(x, schedule=ut.Converge()).logits)
    model.train()
    assert_same(model(x).logits, model(x, schedule=model.schedule).logits)
    model.schedule = ut.Jacobi(1)
    assert model(x).passes == 2


def test_the_schedule_is_not_part_of_a_checkpoint(tmp_path):
    model = ut.from_scratch(CONFIGS["gpt2"](), time=ut.LRT(), schedule=ut.Cyclic(4, 1))
    model.save_pretrained(tmp_path)
    assert "Cyclic" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).schedule == ut.Interleaved(2)


def test_tied_weights_survive(tmp_path):
    config = LlamaConfig(**(CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": True}))
    model = ut.from_scratch(config, time=ut.LRT(2)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_copied(loaded, model)
    assert_same(loaded(ids()).logits, model(ids()).logits)


def test_the_base_models_weights_load_by_name(tmp_path):
    from safetensors.torch import load_file

    model = build("llama", time=ut.LRT(2)).float()
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS["llama"]().to_dict()))
    weights = load_file(tmp_path / "model.safetensors")
    base.load_state_dict({n.removeprefix("backbone."): w for n, w in weights.items() if n.startswith("backbone.")})
    x = ids()
    ours = ut.wrap(model.backbone.eval())
    assert_same(base.eval()(x).logits, ours(x, schedule=ut.Jacobi(0)).logits)


def test_wrap_runs_on_the_models_own_tensors():
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).bfloat16()
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = ut.wrap(base, time=ut.T2MLR(1, 2))
    assert model.backbone is base and model.dtype == torch.bfloat16
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.undertow.parameters())
    assert_same(model(ids(), schedule=ut.Jacobi(0)).logits, base(ids()).logits)


def test_copies_are_independent():
    """A deep copy has its own taps, projections and view."""
    model, x = build("gpt2", time=ut.LRT(2)), ids()
    before = model(x).logits
    twin = copy.deepcopy(model)
    assert_same(twin(x).logits, before)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(twin(x).logits, before)


def test_vocabulary_can_grow():
    model = build("llama", time=ut.T2MLR(1, 2))
    before = model(ids()).logits
    model.resize_token_embeddings(V + 5)
    assert model(ids()).logits.shape[-1] == V + 5
    assert gap(model(ids()).logits[..., :V], before) < 1e-12
    assert model.config.get_text_config().vocab_size == V + 5


def test_inputs_embeds():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids()
    assert_same(model(inputs_embeds=model.get_input_embeddings()(x)).logits, model(x).logits)


def test_loss_divides_by_labels_or_by_what_the_trainer_says():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, T)
    labels = x.clone()
    labels[:, :4] = -100
    logits = model(x).logits
    nats = torch.nn.functional.cross_entropy(
        logits[:, 3:-1].reshape(-1, V), x[:, 4:].flatten(), reduction="sum"
    ).detach()
    assert float(model(x, labels=labels).loss.detach()) == pytest.approx(float(nats) / (2 * (T - 4)), abs=1e-12)
    assert float(model(x, labels=labels, num_items_in_batch=7).loss.detach()) == pytest.approx(
        float(nats) / 7, abs=1e-12
    )
    assert float(model(x, labels=torch.full_like(x, -100)).loss) == 0


def test_sweep_losses_add_up():
    model, x = build("gpt2", time=ut.LRT(2)), ids(2, T)
    out = model(x, labels=x, schedule=ut.Jacobi(2, loss=(0.1, 0.3, 0.6)))
    assert out.sweep_losses.shape == (3,)
    assert float(out.loss) == pytest.approx(float((out.sweep_losses * torch.tensor([0.1, 0.3, 0.6]).double()).sum()))


def test_converge_warns_when_cut_short():
    model, x = build("gpt2", time=ut.LRT(2)), ids(2, T)
    with pytest.warns(UserWarning, match="max_sweeps=1"):
        out = model(x, schedule=ut.Converge(max_sweeps=1, G=2))
    assert out.residual > 1e-10 and out.passes == 2


def test_logits_to_keep():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids()
    assert_same(model(x, logits_to_keep=2).logits, model(x).logits[:, -2:])


def test_layer_numbers_count_from_the_end():
    a, b = (build("gpt2", time=ut.T2MLR(*se)) for se in ((1, 2), (-3, -2)))
    assert a.program == b.program
    assert build("gpt2", time=ut.LRT(-1)).program.memories[0][0] == LAYERS - 1


def test_inputs_at_the_edge():
    """Masks of any type, rows of pads alone, rows of one token, labels that ask for nothing: numbers, never NaN."""
    model, x = build("gpt2", ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)), ids(2, 6)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    wanted = model(x, attention_mask=mask).logits
    text = model.generate(x, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=1)
    for kind in (torch.bool, torch.float32):
        assert gap(model(x, attention_mask=mask.to(kind)).logits, wanted) < 1e-12
        found = model.generate(x, attention_mask=mask.to(kind), max_new_tokens=2, do_sample=False, pad_token_id=1)
        assert torch.equal(found, text)
    mask[0] = 0
    out = model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100))
    assert out.logits.isfinite().all() and out.loss.isfinite()
    for labels in (torch.full_like(x, -100), x[:, :1]):
        loss = model(x[:, : labels.shape[1]], labels=labels).loss
        assert loss == 0 and all(g.isfinite().all() for g in gradients(model, loss).values())
    empty = torch.zeros_like(mask)
    text = model.generate(x, attention_mask=empty, max_new_tokens=2, do_sample=False, pad_token_id=1)
    assert text.shape == (2, 8)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(x, attention_mask=torch.ones(2, 1, 6, 6))
