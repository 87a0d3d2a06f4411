"""`undertow import`: a folder in, a folder out, or one line."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import undertow as ut
from commands import call
from models import build, ids
from rounding import assert_copied, assert_same
from sums import tokenizer as characters
from undertow.evaluation.samples import sample
from undertow.training import run

MIXER = {"recurrent_gate_proj": "gate_m", "input_gate_proj": "gate_x"}


@pytest.fixture
def published(tmp_path):
    """A tiny T2MLR checkpoint in a folder, and the model it came from."""
    model = build(time=ut.T2MLR(0, 2, project=None))
    tensors = {}
    for name, x in model.named_parameters():
        name = name.replace("backbone.", "t2mlr_model.").replace("layers.0.", "layers.0.model.")
        for theirs, ours in MIXER.items():
            name = name.replace(f"memory_mixer.{ours}", theirs)
        name = name.replace("memory_mixer.scale_m", "rezero_gamma_recurrent_gate")
        name = name.replace("memory_mixer.scale_x", "rezero_gamma_input_gate")
        tensors[name.replace("undertow.", "t2mlr_model.model.layers.0.t2mlr_mixing_module.")] = x.detach()
    config = {"model_type": "t2mlr", "l_end": 2, "recurrent_mixing_module_name": "gated", "use_learnable_gate": True}
    config |= {"base_config": model.config.backbone.to_dict(), "recurrent_weight": 0.5}  # l_start: left at its default
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


@torch.no_grad()
def test_import(capsys, published, tmp_path):
    folder, model = published
    with pytest.warns(UserWarning, match="never reads: recurrent_weight$"):
        status, out, err = call(capsys, "import", folder, "--out", tmp_path / "ours")
    assert status == 0, err
    assert "llama" in out and "start=0" in out and "Jacobi(K=1, start='unmixed')" in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    assert_copied(loaded, model)
    assert_same(loaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--method", "ilr"), "--method 'ilr': allowed are t2mlr, lrt"),
        (("--method", "lrt"), "config of an LRT checkpoint: vocab_size is missing"),
        (("--names", "nothing.yaml"), "nothing.yaml"),
        (("--names", "bad.yaml"), "bad.yaml: must be a mapping"),
        (("--names", "drop.yaml"), "missing: backbone.model.norm.weight"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_status_2(capsys, published, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("- a\n")
    (tmp_path / "drop.yaml").write_text('".*model\\\\.norm\\\\.weight": null\n')
    status, _, err = call(capsys, "import", published[0], "--out", "ours", *options)
    errors = [text for text in err.splitlines() if not text.startswith("warning: ")]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and line in errors[0]
    assert not (tmp_path / "ours").exists()


def test_out_is_needed(capsys, published):
    status, _, err = call(capsys, "import", published[0])
    assert status == 2 and "--out" in err


def test_imported_models_say_where_their_memory_acts(capsys, published, tmp_path):
    """T2MLR's prompts take in none, unless its config says otherwise; the tokenizer carries it."""
    folder, _ = published
    status, out, _ = call(capsys, "import", folder, "--out", tmp_path / "bare")
    assert status == 0 and "memory: response" in out and "There is no tokenizer; with one, undertow.TextFormat(" in out
    characters().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name, more, memory in (("a", {}, "response"), ("b", {"control_flow_all_recurrent": True}, "all")):
        (folder / "config.json").write_text(json.dumps(config | more))
        status, out, _ = call(capsys, "import", folder, "--out", tmp_path / name)
        assert status == 0 and f"memory: {memory}" in out and "There is no tokenizer" not in out
        form = run.load(tmp_path / name, "cpu").format
        assert (form.memory, form.bos, form.layout) == (memory, False, "plain")
    model, form = run.load(tmp_path / "a", "cpu").model, run.load(tmp_path / "a", "cpu").format
    ids = torch.tensor([form.begin("12+7=").ids])
    expected = model.generate(ids, memory_mask=torch.zeros_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert sample(model, form, "12+7=", 5, temperature=0) == form.tokenizer.decode(expected[0, ids.shape[1] :])
