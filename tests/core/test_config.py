"""`model.config` answers for the backbone's config, both ways, and keeps nothing twice."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import undertow as ut
from models import CONFIGS, V, ids
from undertow.config import UndertowConfig

OWN = ("backbone", "depth", "time", "future", "retrofit")


def config_of(family="llama", **changed):
    hf = CONFIGS[family]()
    for name, value in changed.items():
        setattr(hf, name, value)
    return UndertowConfig(backbone=hf, time=ut.LRT(1).to_dict())


def public(config) -> set[str]:
    """Every field of a config that has a name for others, also those of its own way of naming."""
    return {name for name in (*vars(config), *config.attribute_map) if not name.startswith("_")}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_field_is_the_backbones(family):
    before = CONFIGS[family]().to_dict()
    config = config_of(family)
    names = public(config.backbone) - {"architectures", "transformers_version", "model_type", "base_model_tp_plan"}
    assert len(names) > 10
    for name in names:
        assert getattr(config, name) == getattr(config.backbone, name), name
    after = config.backbone.to_dict()  # and making ours changes nothing there
    assert {n: v for n, v in after.items() if before.get(n) != v} == {}
    assert config.model_type == "undertow" and not hasattr(config, "nonsense")
    with pytest.raises(AttributeError, match="nonsense"):
        config.nonsense  # noqa: B018


def test_what_is_written_reaches_the_backbone():
    config = config_of("gpt2")
    for name, value in (("vocab_size", 50), ("pad_token_id", 3), ("hidden_size", 64), ("use_cache", False)):
        setattr(config, name, value)
        assert getattr(config.backbone, name) == getattr(config, name) == value and name not in vars(config)
    assert config.n_embd == config.backbone.n_embd == 64  # under its own name as well
    for name, value in (("return_dict", False), ("output_hidden_states", True)):  # what every config has
        setattr(config, name, value)
        assert getattr(config.backbone, name) == getattr(config, name) == value
    config._attn_implementation = "eager"
    assert config.backbone._attn_implementation == "eager"
    config.quantity = 1  # a new name is ours
    assert config.quantity == 1 and not hasattr(config.backbone, "quantity")
    config.time = None
    assert config.time is None and not hasattr(config.backbone, "time")


def test_what_every_config_has_starts_as_the_backbones():
    config = config_of(return_dict=False, output_hidden_states=True, dtype="bfloat16")
    assert not config.return_dict and config.output_hidden_states and config.dtype == torch.bfloat16
    assert UndertowConfig(backbone=CONFIGS["llama"](), sliding_window=5, pad_token_id=7).backbone.pad_token_id == 7


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_copies_and_files_are_the_same_config(family, tmp_path):
    config = config_of(family)
    config.pad_token_id = 5
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), UndertowConfig(**config.to_dict())):
        assert again.backbone is not config.backbone and again.pad_token_id == 5
        assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, use_cache=False)
    assert not loaded.backbone.use_cache and loaded.pad_token_id == 5 and loaded.methods() == config.methods()
    different = {"backbone": None, "_name_or_path": None}
    assert {**loaded.to_dict(), **different} == {**config.to_dict(), **different}


def test_nothing_is_kept_twice():
    config = config_of("mistral")
    common = set(GPT2Config().to_dict()) & set(config.backbone.to_dict())  # fields of every config
    saved = json.loads(config.to_json_string())
    assert {"model_type", "backbone", *OWN[1:]} <= set(saved)
    theirs = public(config.backbone) - {"architectures", "transformers_version", "model_type"}
    assert not set(saved) & theirs
    assert set(config.to_dict()) & (theirs - common) == set()


def test_a_dict_is_asked_as_the_config_is():
    """peft turns configs into dicts and looks for sizes and `tie_word_embeddings` there."""
    values = config_of("llama", tie_word_embeddings=True).to_dict()
    assert values["vocab_size"] == V and values.get("tie_word_embeddings") and "num_hidden_layers" in values
    assert values.get("nonsense", 5) == 5 and "nonsense" not in values
    with pytest.raises(KeyError):
        values["nonsense"]
    assert "vocab_size" not in dict(values) and "vocab_size" not in list(values)
    assert copy.deepcopy(values).get("vocab_size") == V and "vocab_size" not in json.loads(json.dumps(values))


def test_tools_know_the_class_by_its_name():
    model = ut.wrap(AutoModelForCausalLM.from_config(CONFIGS["llama"]()), time=ut.LRT(1))
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert model.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert not (model.config.auto_map or {}) and model.loss_type == "ForCausalLM"
    assert model.can_generate() and model.get_decoder()(ids()).logits.numel() == 0
    base = model.base_model
    base.gradient_checkpointing_enable()
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert model.is_gradient_checkpointing and not layers  # the layers' own switch would drop keys and values
