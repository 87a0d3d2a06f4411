"""The way out: a model recurrent over depth as a plain one of its family, and the card beside what is saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import undertow as ut
from commands import call
from models import CONFIGS, build, ids
from rounding import assert_same
from undertow import card
from undertow.convert import unroll
from undertow.data.corpus import Document
from undertow.data.tokenizer import train_tokenizer
from undertow.recipe import Recipe

PLANS = {
    "plain": None,
    "reuse": ut.ReuseMap([1, 2, 1, 3]),
    "whole": ut.BlockLoop(2),
    "middle": ut.MiddleLoop(1, 2, 3),
}


@pytest.mark.parametrize("depth", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "nanochat"])
@torch.no_grad()
def test_unrolled_it_computes_the_same(family, depth):
    """To rounding; of Qwen2 only some layers slide, so each layer must keep its kind."""
    model, x = build(family, depth=depth), ids()
    plain = unroll(model)
    assert type(plain) is type(model.backbone)
    assert plain.config.num_hidden_layers == len(model.program.steps)
    assert_same(plain(x).logits, model(x, schedule=ut.Jacobi(0)).logits)


@pytest.mark.parametrize(
    "family, methods, line",
    [
        ("llama", {"time": ut.T2MLR(1, 2)}, "T2MLR carries a state over time"),
        ("llama", {"depth": ut.BlockLoop(2, inject=True)}, r"parts that its family has not \(inject\)"),
        ("llama", {"depth": ut.TRMBlock()}, "the model has parts that its family has not"),
        ("undertow_llama", {"depth": ut.BlockLoop(2)}, "undertow_llama is a family of our own"),
    ],
)
def test_what_no_plain_model_computes_is_one_line(family, methods, line):
    with pytest.raises(ValueError, match=f"export: .*{line}.*; only a plan") as raised:
        unroll(build(family, **methods))
    assert "\n" not in str(raised.value)


def test_a_layer_that_knows_its_number_is_refused():
    with pytest.raises(ValueError, match="export: scale_attn_by_inverse_layer_idx"):
        unroll(build("gpt2", depth=ut.BlockLoop(2), scale_attn_by_inverse_layer_idx=True))


@torch.no_grad()
def test_the_command_writes_what_any_tool_loads(tmp_path, capsys):
    tokenizer = train_tokenizer([Document("0", "a plain text")], 257, tmp_path / "cache")
    config = CONFIGS["llama"]()
    config.vocab_size, config.tie_word_embeddings = 257, True
    model = ut.from_scratch(config, depth=ut.ReuseMap([1, 2, 1, 1])).eval()
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    status, out, err = call(capsys, "export", tmp_path / "run", "--out", tmp_path / "plain")
    assert status == 0 and "llama, 5 layers" in out, err
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "llama"
    plain, x = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval(), ids()
    assert_same(plain(x).logits, model(x, schedule=ut.Jacobi(0)).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("a").input_ids == tokenizer("a").input_ids
    said = (tmp_path / "plain" / "README.md").read_text()
    assert "library_name: transformers" in said and "import undertow" not in said and "5 layers" in said

    status, _, err = call(capsys, "export", tmp_path / "run", "--out", tmp_path / "plain")
    assert status == 2 and "is not empty" in err
    status, _, err = call(capsys, "export", tmp_path / "nothing", "--out", tmp_path / "new")
    assert status == 2 and "no such folder" in err and not (tmp_path / "new").exists()


def test_a_saved_model_has_a_card_and_keeps_the_one_it_had(tmp_path):
    model = build("llama", time=ut.T2MLR(1, 2))
    model.save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "README.md"
    assert "# mine\n" in file.read_text() and "- over time: T2MLR(start=1, end=2" in file.read_text()
    file.write_text("more was said here")
    model.save_pretrained(tmp_path / "mine")
    assert file.read_text() == "more was said here"


def test_the_card_says_what_it_is_and_how_it_came_about():
    recipe = Recipe.parse(
        {
            "name": "carried",
            "backbone": {"pretrained": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "time": "T2MLR(4, -5)",
            "data": {"source": "VariableAssignment(depth=1)", "seq_len": 128},
            "training": {"max_steps": 3, "lora": {"rank": 4}, "gates_first": 0.25},
        }
    )
    result = {"steps": 3, "tokens": 6144, "training_flops": 1.5e12, "bits_true": 0.875, "solved": 0.0}
    said = card.card(build("llama", depth=ut.ReuseMap([1, 2, 1, 1]), time=ut.T2MLR(1, 2)), "carried", recipe, result)
    for line in (
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
        "import undertow",
        "- plan: blocks 0 1 1 2 3",
        "- over time: T2MLR(start=1, end=2",
        "VariableAssignment (",
        "depth=1",
        "3 steps, 6,144 tokens, 1.50e+12 FLOPs",
        "adapters of rank 4",
        "first 25% of the steps",
        "true decoding | 0.8750 |",
        "problems solved | 0.0000 |",
    ):
        assert line in said, said
