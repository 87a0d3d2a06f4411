"""What people do to a Hugging Face model: vocabulary, precision, devices, quantised weights, adapters of their own."""

import copy
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import undertow as ut
from models import CONFIGS, V, gap, ids, randomise
from rounding import assert_same, same
from undertow.backbone.pretrained import load_backbone

METHODS = {"t2mlr": dict(time=ut.T2MLR(1, 2)), "lrt_twice": dict(depth=ut.ReuseMap([1, 2, 1, 1]), time=ut.LRT(2))}


def tied(**methods):
    torch.manual_seed(0)
    config = LlamaConfig(**(CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": True}))
    return randomise(ut.from_scratch(config, **methods)).eval()


@pytest.fixture
def saved(tmp_path):
    tied(**METHODS["t2mlr"]).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@torch.no_grad()
def test_a_tied_vocabulary_grows_and_survives(tmp_path):
    model, x = tied(time=ut.T2MLR(1, 2)), ids()
    before = model(x).logits
    model.resize_token_embeddings(V + 5, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same(loaded(x).logits, model(x).logits) and gap(loaded(x).logits[..., :V], before) < 1e-6


@pytest.mark.deprecated
@torch.no_grad()
def test_precision_is_what_is_asked_for(saved):
    half = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    before = AutoModelForCausalLM.from_pretrained(saved, torch_dtype=torch.bfloat16)  # its older name
    assert {p.dtype for p in before.parameters()} == {torch.bfloat16}
    whole = AutoModelForCausalLM.from_pretrained(saved, dtype="auto").eval()
    assert whole.dtype == torch.float32
    assert gap(half(ids(), schedule=ut.Jacobi(0)).logits, whole(ids(), schedule=ut.Jacobi(0)).logits.bfloat16()) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}], ids=["name", "auto", "map"])
def test_device_map(saved, where):
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=where).eval()
    assert_same(model(ids()).logits, AutoModelForCausalLM.from_pretrained(saved).eval()(ids()).logits)


@torch.no_grad()
def test_layers_may_lie_on_the_disk(saved, tmp_path):
    """accelerate brings a layer in when it is called, and we call it as Hugging Face does."""
    plain = AutoModelForCausalLM.from_pretrained(saved).eval()
    places = {"backbone.model.embed_tokens": "cpu", "backbone.model.norm": "cpu", "backbone.model.rotary_emb": "cpu"}
    places |= {f"backbone.model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
    places |= {"backbone.lm_head": "cpu", "undertow": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "off").eval()
    assert model.backbone.model.layers[2].mlp.up_proj.weight.device.type == "meta"
    assert_same(model(ids()).logits, plain(ids()).logits)


def test_quantised_weights_need_their_package(tmp_path):
    if importlib.util.find_spec("torchao"):
        pytest.skip("torchao is installed")
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path)
    wanted = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    with pytest.raises(ValueError, match="(?i)backbone.pretrained: .*torchao") as raised:
        load_backbone(tmp_path, quantization_config=wanted)
    assert "\n" not in str(raised.value)


def test_quantised_layers_that_run_twice_are_warned_of(recwarn):
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    base.is_quantized = True  # as Hugging Face's quantisers mark a model
    ut.wrap(base, time=ut.T2MLR(1, 2))
    assert not [w for w in recwarn if "quantised" in str(w.message)]
    with pytest.warns(UserWarning, match="block 1 runs 2 times a token"):
        ut.wrap(base, depth=ut.ReuseMap([1, 2, 1, 1]))


@pytest.mark.filterwarnings("ignore")  # of the package itself
def test_weights_in_eight_bits(tmp_path):
    """torchao's integer weights run, decode and carry gradients to what is new; they are not saved."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    torch.manual_seed(0)
    plain = randomise(AutoModelForCausalLM.from_config(CONFIGS["llama"]()))
    plain.save_pretrained(tmp_path)
    base = load_backbone(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())).eval()
    x, one_sweep = ids(), {"schedule": ut.Jacobi(0)}
    assert "Int8" in type(base.model.layers[0].mlp.up_proj.weight).__name__
    with torch.no_grad():
        before = base(x).logits
        assert 1e-4 < gap(before, plain.eval()(x).logits) < 0.1
    model = ut.wrap(base, time=ut.LRT(2))
    with torch.no_grad():
        assert_same(model(x, **one_sweep).logits, before)
        more = dict(max_new_tokens=4, do_sample=False, pad_token_id=1)
        assert torch.equal(model.generate(x, **more), model.generate(x, use_cache=False, **more))
    model.train()(x, labels=x).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.undertow.named_parameters() if "scale" in n
    )
    with pytest.raises(ValueError, match="quantised and cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("methods", METHODS.values(), ids=list(METHODS))
def test_adapters_of_ones_own(methods, tmp_path):
    """peft on the wrapped model, what is new trained whole: one step, saved, loaded on a new copy, the same logits."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = randomise(AutoModelForCausalLM.from_config(CONFIGS["llama"]()))
    model = ut.wrap(copy.deepcopy(base), **methods)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], modules_to_save=list(model.undertow))
    adapted, x = peft.get_peft_model(model, config), ids()
    before = adapted.eval()(input_ids=x).logits.detach()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # in the first one gates and B are at zero, which holds the rest back
        optimiser.zero_grad()
        adapted.train()(input_ids=x, labels=x).loss.backward()
        optimiser.step()
    names = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in name for name in names) and any("undertow" in name for name in names)
    assert all("lora" in name or "undertow" in name for name in names)
    with torch.no_grad():
        after = adapted.eval()(input_ids=x).logits
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(ut.wrap(copy.deepcopy(base), **methods), tmp_path).eval()
        assert gap(again(input_ids=x).logits, after) < 1e-6 < 1e-3 < gap(after, before)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_replaced_modules_are_the_ones_that_run(when, monkeypatch):
    """What liger-kernel does to a model: norms and MLPs replaced or rebound, the rotary function patched."""
    from transformers.models.llama import modeling_llama

    class Norm(modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            calls.append("norm")
            return 2 * super().forward(x)

    def mlp(self, x):
        calls.append("mlp")
        return -type(self).forward(self, x)

    def rotary(q, k, cos, sin, *more, **keywords):
        calls.append("rotary")
        return original(q, k, cos, sin, *more, **keywords)

    def patch(lm):
        for layer in lm.model.layers:
            layer.input_layernorm.__class__ = Norm
            layer.mlp.forward = mlp.__get__(layer.mlp)
        lm.model.norm = Norm(lm.config.hidden_size)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)

    calls, original = [], modeling_llama.apply_rotary_pos_emb
    torch.manual_seed(0)
    lm, x = randomise(AutoModelForCausalLM.from_config(CONFIGS["llama"]())).eval(), ids()
    if when == "before":
        patch(lm)
    model = ut.wrap(lm, time=ut.T2MLR(1, 2))
    if when == "after":
        patch(lm)
    wanted = lm(x).logits
    once = sorted(calls)
    calls.clear()
    assert same(model(x, schedule=ut.Jacobi(0)).logits, wanted) and sorted(calls) == once
    assert once == ["mlp"] * 4 + ["norm"] * 5 + ["rotary"] * 4
