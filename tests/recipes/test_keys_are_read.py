"""Every key that a recipe accepts is read by what runs; one that nothing would read is refused.

A few tiny runs are trained and measured while every read of a section's key is written down. Then each key of each
section is set to another value, one at a time: either the recipe refuses it with "does not apply to", or the run read
it.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tiny_tasks
import undertow as ut
from undertow import recipe as recipes
from undertow.analysis import compare
from undertow.backbone import FAMILIES, config_fields
from undertow.recipe import Recipe, RecipeError
from undertow.recipe_sections import Data, Evaluation, Section, Training
from undertow.training import run

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"family": "llama", **SIZES}
TINY = {"batch_size": 2, "max_steps": 2, "log_every": 1, "save_every": 2, "tensorboard": False, "precision": "float32"}
MEASURED = {"points": 1, "rows": 2, "batch_size": 2, "new_tokens": 2, "records": 2}

# Another value of every key; those of one section together must not be needed to understand one of them.
OTHER = {
    Training: dict(
        max_steps=3, max_tokens=500.0, max_flops=1e12, tokens_per_parameter=0.5, batch_size=3, accumulation=2,
        learning_rate=0.01, recurrent_lr=2.0, lr_groups={"norm": 2.0}, optimiser="muon", weight_decay=0.2,
        betas=(0.5, 0.6), decay="constant", warmup=0.1, cooldown=0.3, floor=0.2, recurrent_weight={"start": 0.5},
        train_only="layers", lora={"rank": 2}, gates_first=0.5, clip=0.5, nonfinite="skip", precision="bfloat16",
        checkpointing=True, skip_logits=True, compile=True, log_every=2, save_every=1, keep=1, workers=1,
        tensorboard=True, report_to=["trackio"], statistics=False,
    ),
    Data: dict(
        source="topics", tokenizer="a/b", vocab_size=300, seq_len=16, validation="x.txt", validation_rows=3,
        loss="all", memory="all", stream=True, documents=5, cache_dir="elsewhere", pause={"token": "a", "mean": 0.5},
        tokenizer_characters=500, special_tokens="ids", bos=False, eos=False, layout="plain",
    ),
    Evaluation: dict(
        batch_size=3, points=2, rows=1, precision="bfloat16", sequential=True, text="topics", text_rows=1,
        prompts=("a",), new_tokens=3, accuracy=False, split="train", records=1, samples=2, temperature=0.5,
        pass_at=(1,), max_new_tokens=2,
    ),
}  # fmt: skip
LATER = {(Evaluation, "records")}  # of text, read by `undertow eval --lengths` and `--icl`, not at the end of a run


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Recipes of unlike runs, as plain values."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"the {i} cats sat on {i} mats and ate {i} rats. " * 8)
    text = {"source": str(folder / "text"), "vocab_size": 270, "seq_len": 24, "cache_dir": str(folder / "cache")}
    sums = {"source": {"task": "Sums"}, "vocab_size": 270, "seq_len": 32, "cache_dir": str(folder / "cache")}
    return {
        "text": {"backbone": LLAMA, "time": "T2MLR(0, 1)", "data": text, "training": TINY, "evaluation": MEASURED},
        "nanochat": {
            "backbone": LLAMA, "depth": "ReuseMap([2, 1])", "data": text,
            "training": {**TINY, "optimiser": "nanochat", "decay": "stable"},
            "evaluation": {**MEASURED, "text": "topics"},
        },
        "task": {
            "backbone": LLAMA, "time": "T2MLR(0, 1)", "data": {**sums, "stream": True},
            "training": {**TINY, "decay": "constant"}, "evaluation": {**MEASURED, "samples": 2},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def reads(bases, tmp_path_factory):
    """Recipe -> `(section, key)` pairs that its run read, from training to measuring."""
    seen: set = set()
    original = Section.__getattribute__

    def spy(self, key):
        if not key.startswith("_") and key in type(self).__pydantic_fields__:
            frame = sys._getframe(1)
            if frame.f_code.co_name == "value":  # of a conditional key: who asks is one further up
                frame = frame.f_back
            if not Path(frame.f_code.co_filename).name.startswith(("recipe", "main.py")):
                seen.add((type(self), key))
        return original(self, key)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("undertow.tasks", fromlist=["TASKS"]).TASKS, "Sums", tiny_tasks.Sums)
        for name, values in bases.items():
            recipe, folder = Recipe.parse(values), tmp_path_factory.mktemp(name) / "run"
            seen.clear()
            patch.setattr(Section, "__getattribute__", spy)
            run.train(recipe, run.folder_for(recipe, folder), device="cpu")
            patch.setattr(Section, "__getattribute__", original)
            found[name] = set(seen)
        yield found


@pytest.mark.parametrize("base", ["text", "nanochat", "task"])
def test_an_accepted_key_is_read_and_another_is_refused(bases, reads, base):
    refused = []
    for section, others in OTHER.items():
        where = section.__name__.lower()
        assert set(others) == set(section.model_fields), "a key without another value is not looked at"
        for key, value in others.items():
            values = {**bases[base], where: {**bases[base].get(where, {}), key: value}}
            try:
                Recipe.parse(values)
            except RecipeError as error:
                if f"{where}.{key}: " in str(error):
                    refused.append(f"{where}.{key}")
                    continue  # else it makes another key of this recipe useless, which is said of that one
            read = (section, key) in reads[base] or (base != "task" and (section, key) in LATER)
            assert read, f"{where}.{key}={value!r} is accepted, but nothing reads it"
    expected = {
        "text": {
            *("training.cooldown", "data.documents", "data.stream", "evaluation.text_rows"),
            *("evaluation.split", "evaluation.samples", "evaluation.temperature", "evaluation.pass_at"),
            "evaluation.max_new_tokens",
        },
        "nanochat": {"training.betas", "training.recurrent_lr", "data.documents", "evaluation.temperature"},
        "task": {"training.cooldown", "training.floor", "evaluation.text_rows", "data.validation"},
    }[base]
    assert expected - set(refused) == set()


# ------------------------------------------------------------------ the backbone's fields


def small(family: str) -> dict:
    cls = CONFIG_MAPPING[family]
    known = config_fields.allowed(cls)
    sizes = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32, "vocab_size": 40}
    return {key: value for key, value in sizes.items() if key in known}


@pytest.mark.parametrize("family", [name for family in FAMILIES for name in family.model_types])
def test_every_field_of_a_backbone_is_read_or_refused(family, monkeypatch):
    """Fields are watched while a model is built, takes a step and generates; the others may not be set."""
    cls, seen = CONFIG_MAPPING[family], set()
    original = cls.__getattribute__

    def spy(self, key):
        if sys._getframe(1).f_code.co_name not in ("to_dict", "to_diff_dict", "deepcopy", "_reconstruct"):
            seen.add(cls.attribute_map.get(key, key))
        return original(self, key)

    variants = [{}] if family != "undertow_llama" else [{"position": name} for name in ("rope", "fire", "cope")]
    configs = [cls(**small(family), **variant) for variant in variants]
    monkeypatch.setattr(cls, "__getattribute__", spy)
    for config in configs:
        config.eos_token_id = config.bos_token_id = config.pad_token_id = None
        model = ut.from_scratch(config, depth=ut.ReuseMap([1, 2]), time=ut.T2MLR(0, 1))
        x = torch.randint(0, 40, (2, 6))
        model.train()(x, labels=x).loss.backward()
        model.eval().generate(x, attention_mask=torch.ones_like(x), max_new_tokens=2, do_sample=False)
    monkeypatch.setattr(cls, "__getattribute__", original)
    derived = {"window_pattern", "max_position_embeddings"}  # of the config itself, and of `build_model`
    fields = {cls.attribute_map.get(name, name) for name in config_fields.allowed(cls)}
    assert fields - seen - derived - config_fields.UNREAD == set()


@pytest.mark.parametrize(
    "family, given, said",
    [
        ("gpt2", {"n_embd": 64, "hidden_size": 32}, "backbone.hidden_size: 32: is the same field as n_embd (64)"),
        ("gpt2", {"summary_type": "mean"}, "backbone.summary_type: 'mean': does not apply to this gpt2"),
        ("llama", {"use_cache": False}, "backbone.use_cache: False: does not apply"),
        ("llama", {"eos_token_id": 7}, "backbone.eos_token_id: 7: does not apply"),
        ("qwen2", {"sliding_window": 16}, "backbone.sliding_window: 16: does not apply"),
        ("qwen2", {"max_window_layers": 1}, "backbone.max_window_layers: 1: does not apply"),
        ("undertow_llama", {"fire_scale": 0.5}, "fire_scale"),
        ("undertow_nanochat", {"value": "none", "value_gate_channels": 4}, "value_gate_channels"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(family, given, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"backbone": {"family": family, **small(family), **given}})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_fields_that_decide_about_others_are_taken():
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = Recipe.parse({"backbone": {"family": "qwen2", **small("qwen2"), **window}}).backbone.hf_config()
    assert config.layer_types == ["full_attention", "sliding_attention"] and config.sliding_window == 16
    for default in ({"use_cache": True}, {"hidden_act": "silu"}, {"num_key_value_heads": 2}):
        Recipe.parse({"backbone": {"family": "llama", **small("llama"), **default}})


@pytest.mark.parametrize("name, field", [("hidden_size", "n_embd"), ("n_embd", "hidden_size")])
def test_set_replaces_a_field_whatever_the_file_calls_it(name, field):
    values = {"backbone": {"family": "gpt2", name: 32, "n_layer": 2, "n_head": 2}}
    recipes.override(values, [f"backbone.{field}=64"])
    assert Recipe.parse(values).backbone.hf_config().hidden_size == 64


# ------------------------------------------------------------------ models of a comparison, and finished runs


def plan(models, **shared):
    values = {"backbone": LLAMA, "budget": {"steps": 2}, "models": models, **shared}
    return compare.parse(values, "plan")


BOTH = [{"name": "plain"}, {"name": "memory", "time": "T2MLR(0, 1)"}]


def test_a_shared_key_is_for_the_models_that_read_it():
    made = plan(BOTH, training={"recurrent_lr": 5.0, "batch_size": 2}, schedule="Cyclic(2, 1)").recipes
    assert made["memory"].training.recurrent_lr == 5.0 and made["memory"].schedule is not None
    assert made["plain"].training.recurrent_lr == 1.0 and made["plain"].schedule is None
    assert made["plain"].training.batch_size == 2


@pytest.mark.parametrize("models", [BOTH[:1], [{"name": "plain", "training": {"recurrent_lr": 5.0}}, BOTH[1]]])
def test_a_key_that_no_model_reads_is_refused(models):
    with pytest.raises(RecipeError, match=r"training\.recurrent_lr: 5\.0: does not apply to a model whose methods"):
        plan(models, training={"recurrent_lr": 5.0})


def test_points_do_not_apply_to_a_finished_run(tmp_path):
    with pytest.raises(RecipeError, match=r"evaluation\.points=3: does not apply to a finished run"):
        run.evaluate(tmp_path, ["evaluation.points=3"])


@pytest.mark.parametrize(
    "component",
    [
        "LRT(residual=False, residual_scale=0.5)",
        "LRT(key=False, value=False, shared=False)",
        "LRT(key=False, value=False, gates=False)",
        "LRT(gates=False, gate_channels=2)",
        "T2MLR(0, 1, carry_weight=0.5)",
        'T2MLR(0, 1, mixer_options={"alpha": 1.0})',
        'Cyclic(4, 1, solve="cyclic")',
        'Converge(solve="cyclic")',
        "Cyclic(4, 1, backward=1, adjoint=1)",
    ],
)
def test_an_option_of_a_method_or_schedule_that_nothing_reads_is_refused(component):
    section = "time" if component.startswith(("LRT", "T2MLR")) else "schedule"
    with pytest.raises(RecipeError, match=f"^{section}: "):
        Recipe.parse({"backbone": LLAMA, "time": "T2MLR(0, 1)", section: component})
