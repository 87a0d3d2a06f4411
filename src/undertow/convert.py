"""Published checkpoints -> ours, strictly: each of our tensors is filled by one of theirs, each of theirs has a place.

Otherwise nothing is written. No pickled code is ever run. What is called what is data, in `undertow.published`.
`unroll` is the way out: a model that is recurrent over depth alone, as a plain and deeper model of its family.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from undertow.backbone import family_of
from undertow.data.format import carry
from undertow.methods.base import Method
from undertow.model import UndertowForCausalLM, from_scratch
from undertow.published import OURS_ALONE, READERS, Names, plain


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
    bare = plain(name)
    for pattern, ours in names.items():
        try:
            found = re.fullmatch(pattern, bare)
            if found is not None:
                return None if ours is None else found.expand(ours)
        except (re.error, IndexError) as error:
            raise ValueError(f"names: {pattern!r} -> {ours!r}: {error}") from None
    known, rest = set(backbone), _BLOCK.sub(r"\1.\2.", bare)
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
    missing = [name for name, x in ours.items() if x.data_ptr() not in filled and name not in OURS_ALONE]
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
    """What was imported: backbone and method, how many tensors, the schedule it was trained with, where its memory
    acts, and whether there is a tokenizer to carry that."""

    backbone: str
    time: dict
    tensors: int
    training: str
    memory: str
    tokenizer: bool


def import_checkpoint(folder: Path, out: Path, method: str | None = None, names: Names | None = None) -> Imported:
    """Read a published checkpoint and write it as ours, tokenizer included.

    The weights keep their precision (that of the widest of them). The tokenizer carries how texts were read (see
    `undertow.data.TextFormat`): a T2MLR checkpoint decodes prompts without memory, LRT has it everywhere.

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
    memory = published.format["memory"]
    told = carry(out, published.format)
    return Imported(base["model_type"], published.time, len(theirs), published.training, memory, told)


@torch.no_grad()
def unroll(model: UndertowForCausalLM) -> PreTrainedModel:
    """A plain model of the backbone's family that computes the same: one layer for each visit, weights repeated.

    It is as deep as the plan is long, and its file as large; any tool that knows the family loads it.

    Raises:
        ValueError: a state is carried over time, or the plan is more than a sequence of layers.
    """
    config, family, steps = copy.deepcopy(model.config.get_text_config()), model.view.family, model.program.steps
    why = _not_plain(model)
    if why is not None:
        raise ValueError(f"export: {why}; only a plan of the backbone's own layers, each with its own keys and values")
    blocks = [step.block for step in steps if isinstance(step.block, int)]
    kinds = getattr(config, "layer_types", None)  # not every family says it layer by layer
    if kinds is not None:
        config.layer_types = [kinds[block] for block in blocks]
    config.num_hidden_layers = len(blocks)
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    prefix = f"{family.base}.{family.layers}."
    held = {name: x for name, x in model.backbone.state_dict().items() if not name.startswith(prefix)}
    for i, block in enumerate(blocks):
        own = model.view.layers[block].state_dict()
        held |= {f"{prefix}{i}.{name}": x for name, x in own.items()}
    plain.load_state_dict(held)
    plain.generation_config = model.generation_config
    return plain.eval()


def _not_plain(model: UndertowForCausalLM) -> str | None:
    """What keeps a model from being a plain one of its family; None: nothing."""
    config, steps = model.config.get_text_config(), model.program.steps
    if model.program.memories:
        return f"{model.config.time['method']} carries a state over time"
    if model.view.family.ours:
        return f"{config.model_type} is a family of our own"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):  # a field of one family's config
        return "scale_attn_by_inverse_layer_idx makes a layer depend on its number"
    if len(model.undertow):
        return f"the model has parts that its family has not ({', '.join(model.undertow)})"
    for step in steps:
        if not isinstance(step.block, int) or step.reads != ("h",) or step.writes != ("h",) or step.shares:
            return f"visit {step.index} (block {step.block!r}) is not a layer on the stream"
    return None


def export(folder: Path, out: Path) -> PreTrainedModel:
    """Write a trained model, unrolled, with its tokenizer and a model card.

    Args:
        folder: a run, or what `save_pretrained` wrote.
        out: a new or empty folder.

    Raises:
        FileNotFoundError: no model there.
        ValueError: `out` is not empty, or the model cannot be unrolled.
    """
    from undertow import card
    from undertow.training import run

    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; --out must name a new folder")
    loaded = run.load(folder, "cpu")
    plain = unroll(loaded.model)
    plain.save_pretrained(out)
    loaded.format.save_pretrained(out)
    card.write(out, plain, out.resolve().name, loaded.recipe)
    return plain
