"""A folder for a model that has none, for tools that load a model again by its name.

`config._name_or_path` is where a model comes from, and tools take it at its word: TRL's trainers load their reference
model from there, and their tokenizer. A wrapped model comes from nowhere as a whole (its backbone's folder holds
another model). So when somebody asks for the name, it is that of a temporary folder with the config and the backbone's
tokenizer, and `from_pretrained` of that folder copies the model in memory as it is then. Folder and model go together.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedConfig

if TYPE_CHECKING:
    from undertow.model import UndertowForCausalLM

_MODELS: weakref.WeakSet[UndertowForCausalLM] = weakref.WeakSet()
_FOLDERS: weakref.WeakValueDictionary[str, UndertowForCausalLM] = weakref.WeakValueDictionary()


def announce(model: UndertowForCausalLM) -> None:
    """Let the model be found by its config."""
    _MODELS.add(model)


def folder_of(config: PreTrainedConfig) -> str:
    """The folder of the model whose config this is; empty where there is no such model, or more than one."""
    models = [model for model in _MODELS if model.config is config]
    if len(models) != 1:
        return ""
    model = models[0]
    known = [folder for folder, other in _FOLDERS.items() if other is model]
    folder = known[0] if known else _new(model)
    saved = PreTrainedConfig.to_dict(config) | {"architectures": [type(model).__name__]}
    type(config)(**saved).save_pretrained(folder)  # each time: it may have changed
    return folder


def model_at(folder: object) -> UndertowForCausalLM | None:
    """The model in memory whose folder this is, if it is one's."""
    return _FOLDERS.get(str(folder))


def _new(model: UndertowForCausalLM) -> str:
    folder = tempfile.mkdtemp(prefix="undertow-in-memory-")
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    _FOLDERS[folder] = model
    source = model.backbone.name_or_path
    if source:
        with suppress(OSError, ValueError):  # there is none: who needs one says so
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    return folder
