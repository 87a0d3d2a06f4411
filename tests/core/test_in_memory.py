"""A model without a folder is found by the name in its config, and copied from there."""

import copy
import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import undertow as ut
from models import CONFIGS, gap, ids, randomise
from undertow import in_memory


def wrapped(schedule=None):
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    return randomise(ut.wrap(base, depth=ut.ReuseMap([1, 2, 1, 1]), time=ut.LRT(2), schedule=schedule)).eval()


@torch.no_grad()
def test_by_its_name_a_model_in_memory_is_copied_as_it_is():
    model, x = wrapped(ut.Cyclic(4, 1)), ids()
    name = model.config._name_or_path
    assert name == model.config.name_or_path and AutoConfig.from_pretrained(name).methods() == model.config.methods()
    randomise(model, seed=1)  # after it was named
    model.resize_token_embeddings(48, mean_resizing=False)
    copied = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float64).eval()
    assert copied is not model and copied.schedule == model.schedule and copied.config.vocab_size == 48
    assert copied.dtype == torch.float64 and gap(copied(x).logits, model.double()(x).logits) < 1e-6
    for p in copied.parameters():
        p.zero_()
    assert float(model(x).logits.abs().max()) > 0  # weights are its own


def test_every_copy_has_a_name_of_its_own_and_takes_its_folder_along():
    model = wrapped()
    other = copy.deepcopy(model)
    folders = [Path(m.config._name_or_path) for m in (model, other)]
    assert folders[0] != folders[1] and all(f.is_dir() for f in folders)
    assert model.config._name_or_path == str(folders[0])
    del model, other
    gc.collect()
    assert not any(f.exists() for f in folders)


def test_a_saved_model_keeps_its_own_name_and_a_bare_config_has_none(tmp_path):
    model = wrapped()
    assert model.config.to_dict()["_name_or_path"] == ""  # asking for all fields makes no folder
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._name_or_path == str(tmp_path)
    assert copy.deepcopy(model.config)._name_or_path == ""


def test_the_backbones_tokenizer_is_there_too(tmp_path):
    from transformers import AutoTokenizer

    from undertow.data.corpus import Document
    from undertow.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([Document("0", "one and two and three\n" * 20)], 257, tmp_path / "cache")
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = ut.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), time=ut.LRT(2))
    found = AutoTokenizer.from_pretrained(model.config._name_or_path)
    assert found("one and two").input_ids == tokenizer("one and two").input_ids


def test_two_models_of_one_config_have_no_name():
    config = wrapped().config
    models = [ut.UndertowForCausalLM(config) for _ in range(2)]
    assert config._name_or_path == "" and len(models) == 2


def test_saving_asks_for_no_name(tmp_path, monkeypatch):
    """The name of a model in memory is a folder, made when it is read: writing a config does not read it."""
    model = wrapped()
    monkeypatch.setattr(in_memory, "_new", lambda model: pytest.fail("a folder was made"))
    model.config.to_json_string(), model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).methods() == model.config.methods()
