"""Published checkpoints -> ours: which of their tensors is which of ours, and what their settings mean here.

What their names are is data: the tables below, `regular expression of a whole name -> our name` (None: nothing that a
model needs to keep), to which a caller adds. Conversion is strict: each of our tensors is filled by one of theirs and
each of theirs has a place, or nothing is written. No pickled code is ever run.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from undertow.backbone import family_of
from undertow.methods.base import Method
from undertow.model import UndertowForCausalLM, from_scratch

Names = Mapping[str, str | None]

# --- T2MLR (arXiv 2607.15178)

# Its mixer sits inside the block it wraps. `recurrent` is the memory's side, `input` the residual stream's.
T2MLR_NAMES: Names = {
    r".*mixing_module\.recurrent_projection\.weight": "undertow.memory_projection.weight",
    r".*mixing_module\.recurrent_gate_proj\.(weight|bias)": r"undertow.memory_mixer.gate_m.\1",
    r".*mixing_module\.input_gate_proj\.(weight|bias)": r"undertow.memory_mixer.gate_x.\1",
    r".*mixing_module\.rezero_gamma_recurrent_gate": "undertow.memory_mixer.scale_m",
    r".*mixing_module\.rezero_gamma_input_gate": "undertow.memory_mixer.scale_x",
    r".*\.rotary_emb\.inv_freq": None,
}

# Setting -> what it is where config.json leaves it out, and the values we can compute. A setting that only training
# reads (depths, detaching, initialisation, dropout, checkpointing) is not here: it changes nothing in a saved model.
T2MLR_SETTINGS: Mapping[str, tuple[Any, tuple]] = {
    "t2mlr_enabled": (True, (True,)),
    "recurrent_mixing_module_name": ("none", ("gated",)),
    "recurrent_skip_to_l_end": (False, (False,)),
    "pre_norm_streams": (False, (False,)),
    "post_norm": (False, (False,)),
    "recurrent_state_proj_type": ("auto", ("auto", "linear")),
    "use_learnable_recurrent_gate": (False, (True,)),
    "use_learnable_input_gate": (False, (True,)),
    "normalize_gates": (False, (False,)),
    "gate_proj_type": ("linear", ("linear",)),
    "use_rezero_residual": (True, (True,)),
    "rezero_gamma_scalar": (True, (True,)),
    "disable_x_branch": (False, (False,)),
}
CARRY = "recurrent_residual_to_recurrent_cache"
CARRY_SETTINGS = {f"{CARRY}_post_norm_eps": (1e-6, (1e-6,)), f"{CARRY}_post_norm_clamp": (5.0, (5.0,))}
# Buffers of ours that it has no tensor for, since it has no such thing: they stay as they are built.
T2MLR_OURS_ALONE = ("undertow.memory_mixer.strength",)
# Settings that their own code never reads.
DEAD = re.compile(r"recurrent_weight|orig_weight|eval_batch_forward|(use_)?recurrent_weight_curriculum\w*")

# --- LRT (arXiv 2605.26797)

# After `unstacked`: `resid_lambdas.3` is layer 3's entry, `.memory` and `.token` are parts of a gate.
LRT_NAMES: Names = {
    r"transformer\.wte\.weight": "backbone.model.embed_tokens.weight",
    r"lm_head\.weight": "backbone.lm_head.weight",
    r"transformer\.h\.(\d+)\.attn\.c_([qkv])\.weight": r"backbone.model.layers.\1.self_attn.\2_proj.weight",
    r"transformer\.h\.(\d+)\.attn\.c_proj\.weight": r"backbone.model.layers.\1.self_attn.o_proj.weight",
    r"transformer\.h\.(\d+)\.attn\.gate\.token": r"backbone.model.layers.\1.self_attn.value_gate.weight",
    r"transformer\.h\.(\d+)\.attn\.gate\.memory": r"undertow.gate_\1.gate.weight",
    r"transformer\.h\.(\d+)\.mlp\.c_fc\.weight": r"backbone.model.layers.\1.mlp.up_proj.weight",
    r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight": r"backbone.model.layers.\1.mlp.down_proj.weight",
    r"resid_lambdas\.(\d+)": r"backbone.model.layers.\1.scale.alpha",
    r"x0_lambdas\.(\d+)": r"backbone.model.layers.\1.scale.beta",
    r"interleaved_lambdas\.(\d+)": r"undertow.residual_\1.scale",
    r"(?:interleaved_init_)?value_embeds\.(\d+)\.weight": r"backbone.model.value_tables.\1.weight",
    r"interleaved_key_projections\.(\d+)\.W_v\.weight": r"undertow.memory_key_\1.weight",
    r"interleaved_projections\.(\d+)\.W_v\.weight": r"undertow.memory_value_\1.weight",
}
# Field of the backbone's config -> their name of it.
LRT_CONFIG: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "sequence_len",
}
STACKED = re.compile(r"(?:resid|x0|interleaved)_lambdas")  # one entry a layer
GATE = re.compile(r"(transformer\.h\.\d+\.attn)\.(?:triple_gate|ve_gate)\.weight")


def unstacked(theirs: Mapping[str, Tensor], kv_heads: int) -> dict[str, Tensor]:
    """LRT's tensors, one for each of ours: per-layer scalars taken apart, gates split into memory and token rows.

    A gate has 3G rows (local, memory, token), or G without a memory (token alone). It reads the first c <= D channels;
    ours reads all D, so the missing columns are zero.

    Raises:
        ValueError: a gate whose rows fit neither.
    """
    width = next((x.shape[1] for name, x in theirs.items() if name.endswith("attn.c_q.weight")), 0)
    found: dict[str, Tensor] = {}
    for name, x in theirs.items():
        gate = GATE.fullmatch(name)
        if STACKED.fullmatch(name):
            found |= {f"{name}.{i}": x[i : i + 1] for i in range(len(x))}
        elif gate and len(x) == kv_heads:
            found[f"{gate[1]}.gate.token"] = x
        elif gate and len(x) == 3 * kv_heads:
            memory = x[: 2 * kv_heads]
            found[f"{gate[1]}.gate.memory"] = torch.nn.functional.pad(memory, (0, width - memory.shape[1]))
            found[f"{gate[1]}.gate.token"] = x[2 * kv_heads :]
        elif gate:
            raise ValueError(f"{name} has {len(x)} rows: {kv_heads} key/value heads need {kv_heads} or {3 * kv_heads}")
        else:
            found[name] = x
    return found


@dataclass(frozen=True)
class Published:
    """A published checkpoint, read: the backbone's config, the time method, and the tables of its names.

    `split` takes stacked tensors apart before they are renamed; `training` says how it was trained, in our words.
    """

    backbone: dict
    time: dict
    names: Names
    training: str
    split: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def read_t2mlr(config: Mapping) -> Published:
    """The meaning of a T2MLR `config.json`.

    Raises:
        ValueError: a setting whose formula we do not compute (one line, with what is allowed).
    """
    more = config.get("mixing_module_kwargs") or {}
    if not isinstance(more, dict):
        raise ValueError(f"mixing_module_kwargs={more!r}: must be a mapping")
    said = {**config, **more}
    for gate in ("use_learnable_recurrent_gate", "use_learnable_input_gate"):  # None inherits
        if said.get(gate) is None:
            said[gate] = said.get("use_learnable_gate", False)
    carried = said.get(CARRY, False)
    for name, (default, allowed) in {**T2MLR_SETTINGS, **(CARRY_SETTINGS if carried else {})}.items():
        if said.get(name, default) not in allowed:
            only = " or ".join(map(repr, allowed))
            raise ValueError(f"{name}={said.get(name, default)!r}: only {only} can be imported")
    project = "linear" if said.get("use_recurrent_projection", False) else None
    time = {"method": "T2MLR", "start": said.get("l_start", 0), "end": said.get("l_end", -1), "project": project}
    if carried:
        time |= {
            "carry": "residual",
            "carry_weight": said.get(f"{CARRY}_weight", 1.0),
            "carry_norm": said.get(f"{CARRY}_post_norm", False),
            "carry_detach": said.get(f"{CARRY}_detach", False),
        }
    dead = sorted(name for name in said if DEAD.fullmatch(name))
    if dead:
        line = f"settings without a meaning, which the published code never reads: {', '.join(dead)}"
        warnings.warn(line, stacklevel=2)
    base = config.get("base_config")
    if not isinstance(base, dict):
        raise ValueError(f"base_config={base!r}: a T2MLR config.json holds the config of its backbone there")
    width = base.get("hidden_size", base.get("n_embd"))
    if project and said.get("recurrent_projection_dim") not in (None, width):
        dim = said["recurrent_projection_dim"]
        raise ValueError(f"recurrent_projection_dim={dim}: only None and the width, {width}, can be imported")
    base = base | {"model_type": config.get("base_model_type") or base.get("model_type")}
    depth, back = said.get("batch_forward_approximate_depth", 1), said.get("batch_backward_approximate_depth", 10**7)
    live = f", backward={back}" if back < depth else ""
    return Published(base, time, T2MLR_NAMES, f"Jacobi(K={depth}{live}, start='unmixed')")


def read_lrt(config: Mapping) -> Published:
    """The meaning of an LRT (nanochat) model config, `model_config` of its `meta_*.json`."""
    for name in LRT_CONFIG.values():
        if name not in config:
            raise ValueError(f"config of an LRT checkpoint: {name} is missing")
    if not (config.get("use_interleaved") or config.get("use_multi_refine")):
        raise ValueError("use_interleaved and use_multi_refine are off: a plain model, without LRT's memory")
    backbone = {"model_type": "undertow_nanochat"} | {ours: config[name] for ours, name in LRT_CONFIG.items()}
    weights, kv_heads = tuple(config.get("multi_refine_loss_weights") or ()), config["n_kv_head"]
    training = f"Interleaved(S={config.get('interleaved_num_passes', 2)})"
    if config.get("use_multi_refine"):
        training = f"Jacobi(K={config.get('multi_refine_num_passes', 2)}, loss={weights or 'mean'!r})"
    time = {"method": "LRT", "source": -1, "shared": False}
    return Published(backbone, time, LRT_NAMES, training, lambda theirs: unstacked(theirs, kv_heads))


READERS: Mapping[str, Callable[[Mapping], Published]] = {"t2mlr": read_t2mlr, "lrt": read_lrt}


def read_config(folder: Path) -> dict:
    """`config.json`, or `model_config` of the newest `meta_*.json`. Raises FileNotFoundError or ValueError."""
    metas = sorted(folder.glob("meta_*.json"))
    path = folder / "config.json" if (folder / "config.json").exists() or not metas else metas[-1]
    if not path.exists():
        raise FileNotFoundError(f"{folder}: holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a mapping of settings")
    return config.get("model_config", config)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's `*.safetensors`, else of its `pytorch_model*.bin`, else of its newest `model_*.pt`.

    Raises FileNotFoundError, and ValueError: a file is torn, holds more than tensors, or repeats a name of another.
    """
    newest = sorted(folder.glob("model_*.pt"))[-1:]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")) or newest
    if not files:
        raise FileNotFoundError(f"{folder}: holds no weights (*.safetensors, pytorch_model*.bin or model_*.pt)")
    found: dict[str, Tensor] = {}
    for path in files:
        for name, x in _load(path).items():
            if name in found:
                raise ValueError(f"{path}: {name} is also in another file of the folder")
            found[name] = x
    return found


def _load(path: Path) -> dict[str, Tensor]:
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(f"{path}: torn, or holds more than tensors (pickled code is never run)") from None
    if not isinstance(held, dict) or not all(isinstance(x, Tensor) for x in held.values()):
        raise ValueError(f"{path}: must hold a plain state dict, name -> tensor")
    return held


def read_names(path: Path) -> dict[str, str | None]:
    """A YAML mapping `regular expression of their whole name: our name` (null: not needed). Raises ValueError."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or not all(isinstance(x, str | None) for pair in given.items() for x in pair):
        raise ValueError(f"{path}: must be a mapping of regular expressions to names of ours (or null)")
    return given


_INNER = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # wherever they come
_OUTER = ("module", "t2mlr_model", "base_model", "backbone", "model")  # what a model may have been wrapped in
_BLOCK = re.compile(r"\b(layers|h)\.(\d+)\.model\.")  # a wrapped block keeps its weights one level down


def rename(name: str, names: Names, backbone: Iterable[str] = (), base: str = "model") -> str | None:
    """Our name of one of their tensors.

    Args:
        names: the table; the first pattern that matches the whole name decides.
        backbone: names of the backbone's own tensors, which a name in no table is compared with, wrappers stripped.
        base: what the decoder is called in the backbone, for checkpoints that hold the decoder alone.

    Returns:
        None for a tensor that nothing needs.

    Raises:
        KeyError: it has no place.
        ValueError: no regular expression, or a name that refers to a group it lacks.
    """
    plain = _INNER.sub("", name)
    for pattern, ours in names.items():
        try:
            found = re.fullmatch(pattern, plain)
            if found is not None:
                return None if ours is None else found.expand(ours)
        except (re.error, IndexError) as error:
            raise ValueError(f"names: {pattern!r} -> {ours!r}: {error}") from None
    known, rest = set(backbone), _BLOCK.sub(r"\1.\2.", plain)
    while rest not in known:
        if f"{base}.{rest}" in known:
            rest = f"{base}.{rest}"
            break
        first, _, below = rest.partition(".")
        if first not in _OUTER or not below:
            raise KeyError(name)
        rest = below
    return f"backbone.{rest}"


def fill(model: UndertowForCausalLM, theirs: Mapping[str, Tensor], names: Names) -> None:
    """Copy their tensors into a model, every one of both sides exactly once.

    Raises:
        ValueError: tensors of ours that stay unfilled, of theirs that have no place, two for one place, or another
            shape.
    """
    ours = model.state_dict()
    backbone = [name.removeprefix("backbone.") for name in ours if name.startswith("backbone.")]
    place, unused = dict[str, str](), []  # our name -> theirs
    for name in theirs:
        try:
            mine = rename(name, names, backbone, model.backbone.base_model_prefix)
        except KeyError:
            mine = ""
        if mine is None:
            continue
        if mine not in ours:
            unused.append(name if mine == "" else f"{name} (would be {mine})")
        elif mine in place:
            raise ValueError(f"{place[mine]} and {name} are both {mine}")
        else:
            place[mine] = name
    filled = {ours[mine].data_ptr(): mine for mine in place}  # tied tensors are one
    missing = [name for name, x in ours.items() if x.data_ptr() not in filled and name not in T2MLR_OURS_ALONE]
    if missing or unused:
        raise ValueError("; ".join(_some(*what) for what in (("missing", missing), ("unused", unused)) if what[1]))
    for mine, name in place.items():
        x, tied = theirs[name], filled[ours[mine].data_ptr()]
        if x.shape != ours[mine].shape and not x.numel() == ours[mine].numel() == 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: {mine} needs {tuple(ours[mine].shape)}")
        if tied != mine and not torch.equal(x, theirs[place[tied]]):
            raise ValueError(f"{name} and {place[tied]} differ, but the config ties them")
        ours[mine].copy_(x.reshape(ours[mine].shape))


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}"


TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class Imported:
    """What was imported: backbone and method, how many tensors, and the schedule it was trained with."""

    backbone: str
    time: dict
    tensors: int
    training: str


def import_checkpoint(folder: Path, out: Path, method: str | None = None, names: Names | None = None) -> Imported:
    """Read a published checkpoint and write it as ours, tokenizer included.

    The weights keep their precision (that of the widest of them). A T2MLR checkpoint decodes prompts without memory by
    default; ours reads its memory everywhere, which `memory_mask` turns off where it is 0.

    Args:
        folder: holds the config and the weights.
        out: a new or empty folder; `UndertowForCausalLM.save_pretrained` writes it.
        method: `"t2mlr"` or `"lrt"`; None looks at the config.
        names: patterns that come before the method's table.

    Raises:
        FileNotFoundError: no such folder, config or weights.
        ValueError: one line: a setting we do not compute, a torn file, or tensors that do not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; --out must name a new folder")
    config = read_config(folder)
    if method is None:
        method = "t2mlr" if "l_start" in config or config.get("model_type") == "t2mlr" else "lrt"
    if method not in READERS:
        raise ValueError(f"--method {method!r}: allowed are {', '.join(READERS)}")
    published = READERS[method](config)
    theirs = published.split(read_tensors(folder))
    # Attention is a choice of who runs it: saved choices may need packages that are not here.
    base = {key: value for key, value in published.backbone.items() if "attn_impl" not in key}
    family_of(base["model_type"])
    model = from_scratch(AutoConfig.for_model(**base), time=Method.from_dict(published.time, "time"))
    dtypes = [x.dtype for x in theirs.values() if x.is_floating_point()]
    torch.nn.Module.to(model, reduce(torch.promote_types, dtypes or [torch.float32]))
    given = names or {}
    fill(model, theirs, {**given, **published.names, **given})  # the caller's come first, and win
    model.eval().save_pretrained(out)
    for path in (found for pattern in TOKENIZER for found in folder.glob(pattern)):
        shutil.copy(path, out)
    return Imported(base["model_type"], published.time, len(theirs), published.training)
