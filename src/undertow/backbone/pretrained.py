"""Pretrained weights by name: a folder, a hub id, or a GGUF file (dequantised as it is read)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from undertow import hub
from undertow.backbone.known import KNOWN


def source_of(name: str | Path) -> dict[str, Any]:
    """What `from_pretrained` is called with.

    `pretrained_model_name_or_path`; for a GGUF `gguf_file`; `local_files_only` where the hub does not answer: then its
    cache alone is read.

    Args:
        name: a folder Hugging Face has saved, a hub id, a `.gguf` file, or a folder that holds one and no config.json.

    Raises:
        ValueError: a path that is not there, or a folder with several GGUF files.
    """
    if not hub.is_local(name):
        return {"pretrained_model_name_or_path": str(name)} | ({"local_files_only": True} if hub.offline() else {})
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    plain = {"pretrained_model_name_or_path": str(path)}
    files = [] if (path / "config.json").exists() else sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{name}: holds {len(files)} GGUF files; name one of them: {', '.join(files)}")
    return plain | {"gguf_file": files[0]} if files else plain


def pretrained_config(name: str | Path, revision: str | None = None):
    """The config of a pretrained model; its sizes by `KNOWN`, with a warning, where it cannot be had.

    Args:
        name: see `source_of`.

    Raises:
        OSError: it cannot be had, and its sizes are not known.
        ValueError: see `source_of`.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**source_of(name), revision=revision)
    except OSError:
        if name not in KNOWN:
            raise
        warnings.warn(f"{name}: its config cannot be had, so its published sizes are taken", stacklevel=2)
        return AutoConfig.for_model(**KNOWN[str(name)])


def load_backbone(name: str | Path, revision: str | None = None, **keywords):
    """A pretrained causal LM with plain weights, float32 unless `dtype` says otherwise.

    Args:
        name: see `source_of`.
        revision: of a hub id.
        keywords: of `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `quantization_config` ...).

    Raises:
        ValueError: one line: nothing there that can be loaded (pickled weights are not), an unsupported family, or a
            package that is missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from undertow.backbone.families import family_of

    try:
        source = source_of(name)
        chosen: dict[str, Any] = {"dtype": torch.float32, **keywords, **source}
        family_of(AutoConfig.from_pretrained(**source, revision=revision).model_type)  # before gigabytes are read
        model: Any = AutoModelForCausalLM.from_pretrained(revision=revision, use_safetensors=True, **chosen)
    except (OSError, ImportError, SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        what = "neither a model's folder, a GGUF file nor a hub id that can be loaded"
        raise ValueError(f"backbone.pretrained: {str(name)!r}: {what} ({reason})") from error
    if "gguf_file" in source:  # dequantised: plain weights, which may be trained and saved
        model.hf_quantizer.remove_quantization_config(model)
    return model
