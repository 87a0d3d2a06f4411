"""Published checkpoints, written here under their own names, imported: the same weights and logits, or one line."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import undertow as ut
from models import build, ids
from rounding import assert_copied, assert_same
from undertow import convert, published
from undertow.convert import import_checkpoint, rename

MIXER = {
    "undertow.memory_projection.weight": "recurrent_projection.weight",
    "undertow.memory_mixer.gate_m.weight": "recurrent_gate_proj.weight",
    "undertow.memory_mixer.gate_m.bias": "recurrent_gate_proj.bias",
    "undertow.memory_mixer.gate_x.weight": "input_gate_proj.weight",
    "undertow.memory_mixer.gate_x.bias": "input_gate_proj.bias",
    "undertow.memory_mixer.scale_m": "rezero_gamma_recurrent_gate",
    "undertow.memory_mixer.scale_x": "rezero_gamma_input_gate",
}
START = 1


def published_t2mlr(model, outer="t2mlr_model.") -> dict[str, torch.Tensor]:
    """The model's tensors as T2MLR's wrapper names them: block START is wrapped, the mixer lies inside it."""
    block = "transformer.h" if model.config.backbone.model_type == "gpt2" else "model.layers"
    found = {}
    for name, x in model.state_dict().items():
        if name in MIXER:
            found[f"{outer}{block}.{START}.t2mlr_mixing_module.{MIXER[name]}"] = x
        elif name.startswith("backbone.") and not (
            name == "backbone.lm_head.weight" and model.config.backbone.tie_word_embeddings
        ):
            bare = name.removeprefix("backbone.")
            found[outer + bare.replace(f"{block}.{START}.", f"{block}.{START}.model.")] = x
    return {name: x.clone() for name, x in found.items()}


def config_of(model, **more) -> dict:
    """`config.json` as the wrapper saves it: what differs from the defaults, and the backbone's config."""
    base = model.config.backbone.to_dict()
    return {
        "model_type": "t2mlr",
        "base_config": base | {"attn_impl": "flash_attention_2", "attn_implementation": "flash_attention_2"},
        "base_model_type": base["model_type"],
        "l_start": START,
        "l_end": -2,
        "recurrent_mixing_module_name": "gated",
        "use_recurrent_projection": True,
        "use_learnable_gate": True,
        "batch_forward_approximate_depth": 16,
        "batch_backward_approximate_depth": 4,
    } | more


def write(folder, config, tensors, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    for i in range(shards):
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / f"model-{i + 1:05}-of-{shards:05}.safetensors")
    return folder


def t2mlr(**keywords):
    return ut.T2MLR(START, -2, **keywords)


CARRY = {"recurrent_residual_to_recurrent_cache": True, "recurrent_residual_to_recurrent_cache_detach": True}
CASES = {
    "plain": ("llama", {}, {}),
    "carry": (
        "llama",
        dict(carry="residual", carry_norm=True, carry_weight=0.5),
        CARRY | {f"{published.CARRY}_post_norm": True, f"{published.CARRY}_weight": 0.5},
    ),
    "carry without norm": ("llama", dict(carry="residual", carry_norm=False), CARRY),
    "no projection": ("llama", dict(project=None), {"use_recurrent_projection": False}),
    "tied gpt2": ("gpt2", {}, {}),
    "qwen3": ("qwen3", {}, {"use_learnable_recurrent_gate": True, "use_learnable_input_gate": True}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_t2mlr_round_trip(case, tmp_path):
    family, fields, settings = CASES[case]
    model, x = build(family, time=t2mlr(**fields)), ids()
    folder = write(tmp_path / "theirs", config_of(model, **settings), published_t2mlr(model), shards=2)
    found = import_checkpoint(folder, tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    assert type(loaded) is ut.UndertowForCausalLM
    assert_copied(loaded, model)
    for schedule in (ut.Sequential(), ut.Jacobi(3, start="unmixed")):
        assert_same(loaded(x, schedule=schedule).logits, model(x, schedule=schedule).logits)
    assert found.training == "Jacobi(K=16, backward=4, start='unmixed')"
    matter = ["start", "end", "mixer", "carry"]
    matter += ["carry_weight", "carry_norm", "carry_detach"] if "carry" in fields else []
    assert [loaded.config.time[key] for key in matter] == [model.config.time[key] for key in matter]


@torch.no_grad()
def test_gate_orientation_is_the_published_formula(tmp_path):
    """`x + tanh(g_r) sig(G_r [x; P r]) P r + tanh(g_x) sig(G_x [x; P r]) x`, from their tensors by their names."""
    model = build(time=t2mlr())
    theirs = published_t2mlr(model)
    import_checkpoint(write(tmp_path / "theirs", config_of(model), theirs), tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).undertow
    at = f"t2mlr_model.model.layers.{START}.t2mlr_mixing_module."
    x, r = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 5, 32, dtype=torch.float64)
    m = r @ theirs[at + "recurrent_projection.weight"].T
    both = torch.cat([x, m], -1)
    gate = {
        side: torch.sigmoid(both @ theirs[f"{at}{side}_gate_proj.weight"].T + theirs[f"{at}{side}_gate_proj.bias"])
        for side in ("recurrent", "input")
    }
    g_r, g_x = (theirs[f"{at}rezero_gamma_{side}_gate"].tanh() for side in ("recurrent", "input"))
    expected = x + g_r * gate["recurrent"] * m + g_x * gate["input"] * x
    assert torch.allclose(ours["memory_mixer"](x, ours["memory_projection"](r), x), expected, rtol=1e-12)


@pytest.mark.parametrize("outer", ["", "_orig_mod.", "module._orig_mod.t2mlr_model.", "base_model.model.", "model."])
@torch.no_grad()
def test_any_prefix(outer, tmp_path):
    model = build(time=t2mlr())
    theirs = published_t2mlr(model, outer)
    if outer == "":  # the decoder as it is, its block not wrapped
        theirs = {n.replace(f"layers.{START}.model.", f"layers.{START}."): x for n, x in theirs.items()}
    import_checkpoint(write(tmp_path / "theirs", config_of(model), theirs), tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    assert_same(loaded(ids()).logits, model(ids()).logits)


def test_names_of_a_bare_decoder():
    known = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    assert rename("layers.0._orig_mod.mlp.up_proj.weight", {}, known) == f"backbone.{known[0]}"
    assert rename("model.model.norm.weight", {}, known) == "backbone.model.norm.weight"
    for stray in ("aux.lm_head.weight", "norm", "model", "layers.0.mlp.up_proj.bias"):
        with pytest.raises(KeyError):
            rename(stray, {}, known)


@torch.no_grad()
def test_precision_is_kept_and_bin_files_and_tokenizers_are_read(tmp_path):
    """bfloat16 weights with float32 gammas, as published, give float32: nothing is rounded."""
    model = build(time=t2mlr()).to(torch.bfloat16)
    theirs = {n: x.float() + 1e-3 if "gamma" in n else x for n, x in published_t2mlr(model).items()}
    theirs |= {f"t2mlr_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    (folder / "tokenizer.json").write_text("{}")
    torch.save(theirs, folder / "pytorch_model.bin")
    import_checkpoint(folder, tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    at = f"t2mlr_model.model.layers.{START}."
    state = loaded.state_dict()
    assert torch.equal(
        state["undertow.memory_mixer.scale_x"], theirs[f"{at}t2mlr_mixing_module.rezero_gamma_input_gate"]
    )
    name = "self_attn.q_proj.weight"
    assert torch.equal(state[f"backbone.model.layers.{START}.{name}"], theirs[f"{at}model.{name}"].float())
    assert (tmp_path / "ours" / "tokenizer.json").exists()


def refused(tmp_path, config, theirs, line, **keywords):
    """One line that says `line`, and nothing written."""
    folder = write(tmp_path / "theirs", config, theirs)
    with pytest.raises(ValueError, match=re.escape(line)) as error:
        import_checkpoint(folder, tmp_path / "ours", **keywords)
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


def test_every_tensor_of_both_sides_must_be_used(tmp_path):
    model = build(time=t2mlr())
    theirs = published_t2mlr(model)
    at = f"t2mlr_model.model.layers.{START}.t2mlr_mixing_module."
    gone = {n: x for n, x in theirs.items() if not n.endswith(("input_gate_proj.bias", "model.norm.weight"))}
    line = "missing: backbone.model.norm.weight, undertow.memory_mixer.gate_x.bias"
    refused(tmp_path, config_of(model), gone, line)
    refused(tmp_path, config_of(model), theirs | {"t2mlr_model.extra": torch.zeros(1)}, "unused: t2mlr_model.extra")
    line = f"unused: {at}recurrent_projection.weight (would be undertow.memory_projection.weight)"
    refused(tmp_path, config_of(model, use_recurrent_projection=False), theirs, line)
    twice = theirs | {"model.norm.weight": theirs["t2mlr_model.model.norm.weight"].clone()}
    refused(tmp_path, config_of(model), twice, "are both backbone.model.norm.weight")
    narrow = theirs | {f"{at}recurrent_projection.weight": torch.zeros(16, 32)}
    refused(tmp_path, config_of(model), narrow, "has shape (16, 32): undertow.memory_projection.weight needs (32, 32)")
    many = {n: x for n, x in theirs.items() if "mlp" not in n}
    refused(tmp_path, config_of(model), many, " and 8 more")


def test_tied_tensors_may_come_twice_but_must_agree(tmp_path):
    model = build("gpt2", time=t2mlr())
    theirs = published_t2mlr(model)
    head = {"t2mlr_model.lm_head.weight": theirs["t2mlr_model.transformer.wte.weight"].clone()}
    import_checkpoint(write(tmp_path / "agree", config_of(model), theirs | head), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    head["t2mlr_model.lm_head.weight"] += 1
    refused(tmp_path, config_of(model), theirs | head, "differ, but the config ties them")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"recurrent_mixing_module_name": "baseline_codi"},
            "recurrent_mixing_module_name='baseline_codi': only 'gated'",
        ),
        ({"recurrent_mixing_module_name": "none"}, "recurrent_mixing_module_name='none': only 'gated'"),
        ({"t2mlr_enabled": False}, "t2mlr_enabled=False: only True can be imported"),
        ({"use_learnable_gate": False}, "use_learnable_recurrent_gate=False: only True"),
        ({"use_learnable_input_gate": False}, "use_learnable_input_gate=False: only True"),
        ({"recurrent_skip_to_l_end": True}, "recurrent_skip_to_l_end=True: only False"),
        ({"pre_norm_streams": True}, "pre_norm_streams=True: only False"),
        ({"post_norm": True}, "post_norm=True: only False"),
        ({"gate_proj_type": "mlp"}, "gate_proj_type='mlp': only 'linear'"),
        ({"recurrent_state_proj_type": "mlp"}, "recurrent_state_proj_type='mlp': only 'auto' or 'linear'"),
        ({"recurrent_projection_dim": 8}, "recurrent_projection_dim=8: only None and the width, 32"),
        ({"mixing_module_kwargs": {"normalize_gates": True}}, "normalize_gates=True: only False"),
        ({"mixing_module_kwargs": {"use_rezero_residual": False}}, "use_rezero_residual=False: only True"),
        ({"mixing_module_kwargs": {"disable_x_branch": True}}, "disable_x_branch=True: only False"),
        ({"mixing_module_kwargs": "{}"}, "mixing_module_kwargs='{}': must be a mapping"),
        (CARRY | {f"{published.CARRY}_post_norm_clamp": 3.0}, "post_norm_clamp=3.0: only 5.0"),
        ({"l_start": 9}, "start=9: the model has 4 layers"),
        ({"l_start": 3, "l_end": 1}, "start must not be greater than end"),
        ({"base_model_type": "tinyllama"}, "backbone model_type 'tinyllama' is not supported"),
        ({"base_config": None}, "base_config=None"),
    ],
    ids=str,
)
def test_unsupported_settings(settings, line, tmp_path):
    model = build(time=t2mlr())
    refused(tmp_path, config_of(model, **settings), published_t2mlr(model), line)


def test_head_mismatch(tmp_path):
    model = build(time=t2mlr())
    config = config_of(model)
    config["base_config"]["num_key_value_heads"] = 4
    line = "self_attn.k_proj.weight has shape (16, 32): backbone.model.layers.0.self_attn.k_proj.weight needs (32, 32)"
    refused(tmp_path, config, published_t2mlr(model), line)


def test_settings_without_a_meaning_are_listed_once(tmp_path):
    model = build(time=t2mlr())
    dead = {"recurrent_weight": 0.5, "orig_weight": 0.1, "eval_batch_forward": True}
    dead |= {"use_recurrent_weight_curriculum": True, "recurrent_weight_curriculum_start": 0.3}
    folder = write(tmp_path / "theirs", config_of(model, **dead), published_t2mlr(model))
    with pytest.warns(UserWarning) as said:
        import_checkpoint(folder, tmp_path / "ours")
    lines = [str(w.message) for w in said if "without a meaning" in str(w.message)]
    assert len(lines) == 1 and all(re.search(rf"\b{name}\b", lines[0]) for name in dead)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_of(model, freeze_base_model=True, connection_detach=True, gate_mlp_dropout=0.1)
        import_checkpoint(write(tmp_path / "quiet", config, published_t2mlr(model)), tmp_path / "quiet ours")


@torch.no_grad()
def test_names_add_to_the_table_and_come_first(tmp_path):
    model = build(time=t2mlr())
    theirs = {n.replace("recurrent_gate_proj", "G"): x for n, x in published_t2mlr(model).items()}
    theirs["note"] = torch.zeros(3)
    folder = write(tmp_path / "theirs", config_of(model), theirs)
    path = tmp_path / "names.yaml"
    path.write_text('".*module\\\\.G\\\\.(\\\\w+)": "undertow.memory_mixer.gate_m.\\\\1"\nnote: null\n')
    with pytest.raises(ValueError, match="missing: undertow.memory_mixer.gate_m"):
        import_checkpoint(folder, tmp_path / "ours")
    import_checkpoint(folder, tmp_path / "ours", names=convert.read_names(path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    assert_same(loaded(ids()).logits, model(ids()).logits)
    swap = {r".*\.input_gate_proj\.(weight|bias)": r"undertow.memory_mixer.gate_m.\1"}
    with pytest.raises(ValueError, match="are both undertow.memory_mixer.gate_m"):
        import_checkpoint(write(tmp_path / "b", config_of(model), published_t2mlr(model)), tmp_path / "c", names=swap)


@pytest.mark.parametrize(
    ("text", "line"),
    [("- a", "must be a mapping of regular expressions"), ("a: [1]", "must be a mapping"), ("a: {", "not readable")],
)
def test_bad_names_file(text, line, tmp_path):
    (tmp_path / "names.yaml").write_text(text)
    with pytest.raises(ValueError, match=line) as error:
        convert.read_names(tmp_path / "names.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("pattern", "ours"), [("(", "a"), ("a", r"\3")])
def test_bad_patterns(pattern, ours):
    with pytest.raises(ValueError, match="names: "):
        rename("a", {pattern: ours})


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "pickle", "list"])
def test_torn_files_and_pickles_are_one_line(kind, tmp_path):
    model = build(time=t2mlr())
    folder = write(tmp_path / "theirs", config_of(model), published_t2mlr(model))
    weights = next(folder.glob("*.safetensors"))
    if kind == "safetensors":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
        weights = folder / "pytorch_model.bin"
        held = {"pickle": {"x": Touch(tmp_path / "ran")}, "list": [torch.zeros(1)]}
        torch.save(held.get(kind, published_t2mlr(model)), weights)
        if kind == "bin":
            weights.write_bytes(weights.read_bytes()[:-1000])
    line = "must hold a plain state dict" if kind == "list" else "torn, or holds more than tensors"
    with pytest.raises(ValueError, match=line) as error:
        import_checkpoint(folder, tmp_path / "ours")
    assert str(weights) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_folders(tmp_path):
    model = build(time=t2mlr())
    folder = write(tmp_path / "theirs", config_of(model), published_t2mlr(model))
    with pytest.raises(FileNotFoundError, match="nothing: no such folder"):
        import_checkpoint(tmp_path / "nothing", tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="is not empty"):
        import_checkpoint(folder, tmp_path / "full")
    with pytest.raises(ValueError, match="--method 'x': allowed are t2mlr, lrt"):
        import_checkpoint(folder, tmp_path / "ours", method="x")
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        import_checkpoint(tmp_path / "full", tmp_path / "ours")
    (folder / "config.json").write_text('{"l_start": ')
    with pytest.raises(ValueError, match="not readable as JSON"):
        import_checkpoint(folder, tmp_path / "ours")
    (tmp_path / "full" / "config.json").write_text(json.dumps(config_of(model)))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        import_checkpoint(tmp_path / "full", tmp_path / "ours")
