"""Tokenizers from files, also where no class is named: `tokenizer.json` by itself, or a vocabulary and merges.

Hugging Face finds a tokenizer's class in `tokenizer_config.json`. Where none is named, or one that is not known here,
`tokenizer.json` by itself says how a text is split; the special tokens are gathered from the files beside it.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_FILES = ("*.gguf", "*.model", "*.tiktoken", "*.json", "vocab*")  # one of them at least is there in every kind
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SETTINGS = ("model_max_length", "padding_side", "chat_template", "additional_special_tokens")
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")  # what ends a text, where none says


def read_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, its `tokenizer.json`, a GGUF file or by its id on the Hugging Face hub.

    Raises:
        ValueError: nothing there that can be loaded. One line, without the name.
    """
    from transformers import AutoTokenizer

    from undertow.backbone.pretrained import source_of

    path = Path(name).expanduser()
    folder = path.parent if path.name == "tokenizer.json" else path
    try:
        if folder.is_dir() and _classless(folder):
            return _plain(folder)
        return AutoTokenizer.from_pretrained(**source_of(folder if folder != path else name))
    except Exception as error:  # of a damaged file `tokenizers` raises just that, and transformers whatever it trips on
        raise ValueError(" ".join(str(error).split())) from error


def _classless(folder: Path) -> bool:
    """Whether a folder is read as plain files: it has some, and names no class that Hugging Face has.

    Raises ValueError: it has no tokenizer at all, or a SentencePiece model, and the package that reads it is missing.
    """
    import importlib.util

    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if (folder / "tokenizer.json").is_file() or _merges(folder) is not None:
        named = _json(folder / "tokenizer_config.json").get("tokenizer_class")
        return named is None or tokenizer_class_from_name(named) is None
    if (folder / "tokenizer.model").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError("holds tokenizer.model but no tokenizer.json: to read it, pip install sentencepiece protobuf")
    if not any(file for pattern in _FILES for file in folder.glob(pattern)):
        raise ValueError("holds neither tokenizer.json nor vocab.json and merges.txt")
    return False


def _plain(folder: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    written = folder / "tokenizer.json"
    raw = Tokenizer.from_file(str(written)) if written.is_file() else _byte_level(folder)
    config = _json(folder / "tokenizer_config.json")
    settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    special = _special(folder, raw)
    if "eos_token" not in special:
        known = {token.content for token in raw.get_added_tokens_decoder().values() if token.special}
        ends = [token for token in _ENDS if token in known or (not known and raw.token_to_id(token) is not None)]
        if len(ends) == 1:
            special["eos_token"] = ends[0]
            warnings.warn(f"{folder}: no file says which token ends a text; {ends[0]} is taken", stacklevel=4)
    clean = bool(config.get("clean_up_tokenization_spaces"))  # it would lose spaces before punctuation
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=clean, **special, **settings)


def _special(folder: Path, raw: Tokenizer) -> dict[str, str]:
    """The special tokens by their roles, from whichever file says so: by name, or in a model's config by number."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _json(folder / file)
        for role in _SPECIAL:
            token = values.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                found[role] = token
    for file in ("generation_config.json", "config.json"):
        values = _json(folder / file)
        for role in _SPECIAL:
            number = values.get(f"{role}_id")
            number = number[0] if isinstance(number, list) and number else number
            token = raw.id_to_token(number) if isinstance(number, int) else None
            if role not in found and token is not None:
                found[role] = token
    return found


def _merges(folder: Path) -> tuple[Path, Path] | None:
    """A byte-level vocabulary and its merges, by the names that GPT-2's and others' have."""
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        vocabulary, merges = (folder / name for name in names)
        if vocabulary.is_file() and merges.is_file():
            return vocabulary, merges
    return None


def _byte_level(folder: Path) -> Tokenizer:
    """GPT-2's kind of tokenizer, as its two files say it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = _merges(folder)
    assert found is not None  # of `_classless`
    raw = Tokenizer(models.BPE.from_file(*map(str, found)))
    prefix = bool(_json(folder / "tokenizer_config.json").get("add_prefix_space"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    return raw


def _json(path: Path) -> dict[str, Any]:
    """What a file of settings holds; nothing where there is none."""
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: is {type(values).__name__}; must be an object")
    return values
