"""Pretrained weights by name, made recurrent, trained in part or through adapters; tiny models, then the real one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

import undertow as ut
from models import gap, randomise
from rounding import assert_same
from undertow.analysis import compare
from undertow.backbone.pretrained import load_backbone, source_of
from undertow.data.corpus import Document
from undertow.data.tokenizer import load_tokenizer, train_tokenizer
from undertow.recipe import Recipe, RecipeError
from undertow.training import adapters, optimisers, run

TEXT = "c=7\nf=c\nk=f\nThe value of k is 7. A name stands for a digit, or for another name.\n"
METHODS = {"t2mlr": "T2MLR(0, 1)", "lrt": "LRT(1)"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder as Hugging Face saves it: a tiny Llama with tied embeddings, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([Document("0", TEXT)], 280, folder / "cache")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=280, tie_word_embeddings=True, max_position_embeddings=128
    )
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def values(base, tmp_path) -> dict:
    task = {"task": "VariableAssignment", "depth": 0, "n_base": 2, "distractors": 0}
    return {
        "name": "tiny",
        "backbone": {"pretrained": str(base)},
        "time": "T2MLR(0, 1)",
        "schedule": "Cyclic(4, 1)",
        "data": {
            "source": task | {"train": 24, "validation": 4, "test": 4},
            "seq_len": 128,
            "cache_dir": str(tmp_path / "cache"),
        },
        "training": {
            "max_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "precision": "float32",
            "tensorboard": False,
            "statistics": False,
        },
        "evaluation": {"points": 0, "rows": 2, "new_tokens": 2, "records": 2},
    }


def ids(seed=0):
    return torch.randint(3, 280, (2, 17), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize("time", METHODS.values(), ids=list(METHODS))
@torch.no_grad()
def test_step_zero_is_the_base(base, values, time):
    """Tokenizer and weights come from the folder; one full sweep gives the base's logits, any schedule nearly."""
    recipe = Recipe.parse(values | {"time": time, "schedule": None})
    data = run.open_data(recipe)
    assert data.tokenizer.get_vocab() == load_tokenizer(base).get_vocab()
    model = run.build_model(recipe, data.tokenizer).eval()
    lm, x = AutoModelForCausalLM.from_pretrained(base).eval(), ids()
    assert_same(model(x, schedule=ut.Jacobi(0)).logits, lm(x).logits)
    assert gap(model(x, schedule=ut.Cyclic(4, 2)).logits, lm(x).logits) < 1e-5


def test_a_gguf_file_is_read_like_a_folder(base, tmp_path):
    gguf = pytest.importorskip("gguf")
    lm = AutoModelForCausalLM.from_pretrained(base)
    write_gguf(gguf, lm, tmp_path / "tiny.gguf")
    x = ids()
    for name in (tmp_path, tmp_path / "tiny.gguf"):
        assert source_of(name) == {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "tiny.gguf"}
    read = load_backbone(tmp_path)
    with torch.no_grad():
        assert gap(read(x).logits, lm(x).logits) < 1e-6
    read.save_pretrained(tmp_path / "plain")
    model = ut.wrap(read, time=ut.T2MLR(0, 1))
    model.save_pretrained(tmp_path / "ours")
    assert "quantiz" not in (tmp_path / "ours" / "config.json").read_text()


def write_gguf(gguf, lm, path):
    """The weights of a Llama in the order in which llama.cpp rotates: pairs of halves side by side."""
    config = lm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in lm.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for projection, count in heads.items():
            if projection in name:
                weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_hub_id_is_read_from_the_hubs_cache(base, values, tmp_path, monkeypatch):
    """As the hub's own client leaves a download behind; the hub itself is not asked here."""
    from huggingface_hub import constants

    place = tmp_path / "models--someone--tiny"
    for revision in ("main", "v2"):
        shutil.copytree(base, place / "snapshots" / f"{revision}1")
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(f"{revision}1")
    (place / "snapshots" / "v21" / "tokenizer.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = Recipe.parse(values | {"backbone": {"pretrained": "someone/tiny"}, "schedule": None})
    model, x = run.build_model(recipe, run.open_data(recipe).tokenizer).eval(), ids()
    with torch.no_grad():
        assert_same(model(x, schedule=ut.Jacobi(0)).logits, AutoModelForCausalLM.from_pretrained(base)(x).logits)
    shutil.rmtree(place / "snapshots" / "main1")
    load_backbone("someone/tiny", "v2")
    with pytest.raises(ValueError, match="backbone.pretrained: 'someone/tiny': neither"):
        load_backbone("someone/tiny")


def test_pickled_weights_are_not_read(base, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base / name, tmp_path / name)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="backbone.pretrained: .*safetensors") as raised:
        load_backbone(tmp_path)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds 2 GGUF files; name one of them: a.gguf, b.gguf"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match="c.gguf: no such file"):
        load_backbone(tmp_path / "c.gguf")
    with pytest.raises(ValueError, match="backbone.pretrained: .*neither a model's folder, a GGUF file nor") as raised:
        load_backbone(tmp_path / "nothing")
    assert "\n" not in str(raised.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' is not supported"):
        load_backbone(tmp_path / "other")


# ---------------------------------------------------------------------- training in part


def trained(values, folder, callbacks=()):
    recipe = Recipe.parse(values)
    return run.train(recipe, run.folder_for(recipe, folder), device="cpu", callbacks=callbacks)


class Snapshots(TrainerCallback):
    """A copy of one weight of the backbone and one of ours after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        both = (model.view.layers[0].mlp.up_proj.weight, model.undertow["memory_projection"].weight)
        self.seen.append([weight.detach().clone() for weight in both])


def test_gates_first_then_all(base, values, tmp_path):
    values["training"]["gates_first"] = 0.5
    start = AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.up_proj.weight
    watch = Snapshots()
    result = trained(values, tmp_path / "run", [watch])
    theirs, ours = zip(*watch.seen, strict=True)
    assert torch.equal(theirs[1], start) and not torch.equal(theirs[2], start)
    assert not torch.equal(ours[1], ours[0])
    assert result["trained_parameters"] == result["parameters"]


def test_a_frozen_base_is_what_it_was(base, values, tmp_path):
    values["training"]["train_only"] = "^undertow"
    recipe = Recipe.parse(values)
    start = run.build_model(recipe, run.open_data(recipe).tokenizer).undertow.state_dict()
    result = trained(values, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    before, after = AutoModelForCausalLM.from_pretrained(base).state_dict(), model.backbone.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert any(not torch.equal(x, start[name]) for name, x in model.undertow.state_dict().items())
    assert result["trained_parameters"] == sum(x.numel() for x in model.undertow.parameters())


def test_gates_first_needs_both(values, tmp_path):
    first = {"gates_first": 0.5}
    with pytest.raises(ValueError, match="training.gates_first: 0.5: there is nothing under 'undertow'"):
        trained(values | {"time": None, "schedule": None, "training": values["training"] | first}, tmp_path / "a")
    frozen = values["training"] | first | {"train_only": "^undertow"}
    with pytest.raises(ValueError, match="training.gates_first: 0.5: nothing is trained but under 'undertow'"):
        trained(values | {"training": frozen}, tmp_path / "b")


@pytest.mark.parametrize("time", METHODS.values(), ids=list(METHODS))
@torch.no_grad()
def test_adapters_merge_into_what_they_computed(values, time):
    """Taps at keys and values act on projection and adapter together, before and after merging."""
    pytest.importorskip("peft")
    values["training"]["lora"] = {"rank": 2, "dropout": 0.0}
    model = run.build_model(Recipe.parse(values | {"time": time, "schedule": None})).double().eval()
    x = ids()
    start = model(x).logits
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name.startswith("undertow."))
    noise = torch.Generator().manual_seed(1)
    for _, parameter in optimisers.trainable(model):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
    adapted = model(x, schedule=ut.Sequential()).logits
    adapters.merge_lora(model)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert gap(model(x, schedule=ut.Sequential()).logits, adapted) < 1e-5 < 1e-3 < gap(adapted, start)


def test_a_lora_run_saves_a_plain_model(base, values, tmp_path):
    pytest.importorskip("peft")
    values["training"]["lora"] = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    values["evaluation"] |= {"text": "topics", "text_rows": 2}
    result = trained(values, tmp_path / "run")
    assert 0 < result["trained_parameters"] < result["parameters"] / 3
    assert result["bits_text"] > 0 and "solved" in result
    said = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "adapters of rank 2" in said and "problems solved" in said
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    weights, before = loaded.backbone.state_dict(), AutoModelForCausalLM.from_pretrained(base).state_dict()
    moved = {name for name, x in before.items() if not torch.equal(x, weights[name])}
    assert moved and all("q_proj" in name or "v_proj" in name for name in moved)


def test_mistakes_of_adapters_are_one_line(values):
    pytest.importorskip("peft")
    training = values["training"] | {"lora": {"targets": ["nothing"]}}
    with pytest.raises(RecipeError, match=r"training.lora.targets: \('nothing',\)"):
        run.build_model(Recipe.parse(values | {"training": training}))
    with pytest.raises(RecipeError, match="training.lora: says what is trained, and so does train_only"):
        Recipe.parse(values | {"training": training | {"train_only": "x"}})


def test_the_recipe_compares_at_equal_cost():
    file = Path(__file__).parents[2] / "recipes" / "retrofit" / "retrofit.yaml"
    plan = compare.load([file], ["budget.steps=3"])
    assert plan.budget.given == ("steps", 3) and plan.budget.match == "flops" and not plan.flops_of
    ways = {name: (r.training.lora is not None, r.training.train_only) for name, r in plan.recipes.items()}
    assert set(ways.values()) == {(False, None), (True, None), (False, "^undertow")}
    assert next(iter(ways)) == "plain" and len(ways) == 8


@pytest.mark.slow
def test_the_one_command_writes_its_table(tmp_path):
    """All nine rows on a tiny base with as many layers, two steps each, before and after."""
    pytest.importorskip("peft")
    tokenizer = train_tokenizer([Document("0", TEXT)], 280, tmp_path / "cache")
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=22, num_attention_heads=2)
    config = LlamaConfig(**sizes, vocab_size=280, max_position_embeddings=256, bos_token_id=None, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    small = {
        "backbone.pretrained": tmp_path / "base", "data.cache_dir": tmp_path / "cache", "data.seq_len": 256,
        "budget.steps": 2, "training.batch_size": 1, "training.precision": "float32",
        "evaluation.records": 2, "evaluation.rows": 2, "evaluation.text_rows": 2, "evaluation.new_tokens": 2,
    }  # fmt: skip
    asked = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "recipes/retrofit/run.py", "--out", str(tmp_path / "out"), *asked]
    root, environment = Path(__file__).parents[2], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| \n").split(" | ") for line in (tmp_path / "out" / "retrofit.md").open()]
    plan = compare.load([root / "recipes" / "retrofit" / "retrofit.yaml"])
    assert [row[0] for row in rows[2:]] == ["as it comes", *plan.recipes] and len(rows) == 11
    title, solved, prose = rows[0], rows[0].index("problems solved"), rows[0].index("bits/byte of prose")
    assert all(0 <= float(row[solved]) <= 1 and 0 < float(row[prose]) < 20 for row in rows[2:])
    assert len({row[prose] for row in rows[2:]}) > 5  # training changed what is measured
    flops = [float(row[title.index("training FLOPs")]) for row in rows[3:]]
    assert max(flops) / min(flops) < 2.1  # whole steps, of two


# ---------------------------------------------------------------------- the real weights

SMOLLM = Path(os.environ.get("UNDERTOW_SMOLLM2", "runs/smollm2"))


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.is_dir(), reason=f"{SMOLLM} is not there; python recipes/retrofit/fetch.py gets it")
@pytest.mark.parametrize("time", [ut.T2MLR(4, -5), ut.LRT(source=-9)], ids=["t2mlr", "lrt"])
@torch.no_grad()
def test_step_zero_is_smollm2(time):
    lm, tokenizer = load_backbone(SMOLLM).eval(), load_tokenizer(SMOLLM)
    x = tokenizer("c=7\nf=c\nk=f\nThe capital of France is", return_tensors="pt").input_ids
    before = lm(x).logits
    assert tokenizer.decode(before[0, -1].argmax()) == " Paris"
    model = ut.wrap(lm, time=time).eval()
    assert_same(model(x, schedule=ut.Jacobi(0)).logits, before)
    assert gap(model(x).logits, before) < 1e-4
