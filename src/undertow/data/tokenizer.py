"""Tokenizers: a byte-level BPE trained on the corpus, or an existing one; and how many bytes each token stands for."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from undertow.data import cache
from undertow.data.corpus import Document, corpus_hash

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
LONGEST = 10_000  # characters of a document that a budget counts and trains on (nanochat)
SMALLEST = 257  # the 256 bytes and END
_RECIPE = "bpe-1"  # part of the cache key: change it when `train_tokenizer` would train something else


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int, cache_dir: str | Path | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the documents, with `<|endoftext|>` as its bos, eos and pad token.

    Lossless: `decode(encode(text)) == text` for every text (no normaliser, no prefix space, all 256 bytes are tokens).
    The same documents give the same tokenizer. It is kept in `cache_dir` and read from there the next time.

    Args:
        documents: the training documents; nothing of the validation split may be among them.
        vocab_size: tokens, `<|endoftext|>` included. Fewer where the text has no more pairs to merge.
        cache_dir: see `cache.folder`.

    Raises:
        ValueError: `vocab_size` is below 257.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size: {vocab_size}: must be at least {SMALLEST} (the 256 bytes and {END})")
    key = cache.digest([_RECIPE, vocab_size, corpus_hash(documents)])
    path = cache.folder(cache_dir) / f"tokenizer-{key[:24]}.json"
    serialised = _read(path)
    if serialised is None:
        logger.info("training a tokenizer of %d tokens on %d documents", vocab_size, len(documents))
        serialised = _train([document.text for document in documents], vocab_size)
        data = serialised.encode()
        check = hashlib.sha256(data).hexdigest().encode()
        cache.write(path, lambda file: file.write(check + b"\n" + data))
    return _wrap(serialised)


def budget(texts: Iterable[str], characters: int) -> list[Document]:
    """The first texts, each cut to 10,000 characters, until there are so many: what nanochat's tokenizer is trained on.

    All of them are held at once: 2e9 characters take at least 2 GB.
    """
    found, total = list[Document](), 0
    for text in texts:
        found.append(Document(str(len(found)), text[:LONGEST]))
        total += len(found[-1].text)
        if total > characters:
            break
    return found


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """An existing tokenizer, from a folder, a GGUF file (or a folder with one) or by its id on the Hugging Face hub.

    Raises:
        ValueError: nothing there that can be loaded, or `check_tokenizer` refuses it. One line.
    """
    from transformers import AutoTokenizer

    from undertow.backbone.pretrained import source_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(**source_of(name))
    except Exception as error:  # of a damaged file `tokenizers` raises just that, and transformers whatever it trips on
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer: {str(name)!r}: neither a tokenizer's folder nor its hub id ({reason})") from error
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError (one line) if documents cannot be prepared with this tokenizer."""
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {tokenizer.name_or_path!r}: {type(tokenizer).__name__} is not a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {tokenizer.name_or_path!r}: has no eos token, with which every document ends")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Bytes of UTF-8 text that each token stands for.

    Exact for byte-level tokenizers. For SentencePiece-like ones (a space is written `▁`) exact but for the space that
    some of them put before a text. For those whose tokens are whole words, the words' own bytes: what stands between
    words is not counted.

    Returns:
        int64 of shape (V,), V = largest token id + 1; 0 for special tokens and for ids without a token.

    Raises:
        ValueError: the tokenizer is of none of these kinds.
    """
    import torch

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = json.dumps([parts["pre_tokenizer"], parts["decoder"], parts["normalizer"]], ensure_ascii=False)
    if '"ByteLevel"' in kinds:
        length = _byte_level_length
    elif "▁" in kinds:
        length = _sentencepiece_length
    elif parts["model"]["type"] == "WordLevel":
        length = _word_length
    else:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} is neither byte-level, SentencePiece-like nor of whole words: "
            "its bytes are unknown"
        )
    bytes_V = torch.zeros(vocabulary_size(tokenizer), dtype=torch.int64)
    for token, i in tokenizer.get_vocab().items():
        bytes_V[i] = length(token)
    for i, added in tokenizer.added_tokens_decoder.items():
        bytes_V[i] = 0 if added.special else len(added.content.encode())
    bytes_V[tokenizer.all_special_ids] = 0
    return bytes_V


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id + 1 (more than `len(tokenizer)` where ids are left out)."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Hold a tokenizer against a model. Raises ValueError (one line) if it has ids beyond `vocab_size` embeddings."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise ValueError(
            f"tokenizer: has {needed} tokens, but the model's vocab_size is {vocab_size}; it must be at least {needed}"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hexadecimal SHA-256 of all that decides how a document is encoded."""
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return cache.digest([tokenizer.backend_tokenizer.to_str(), *map(str, ends)])


def _train(texts: Sequence[str], vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _wrap(serialised: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(serialised),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,  # it would lose spaces before punctuation
    )


def _read(path: Path) -> str | None:
    """The tokenizer in a cache file (first line: the SHA-256 of the rest); None, with a warning, if it is damaged."""
    if not path.exists():
        return None
    check, _, data = path.read_bytes().partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != check:
        warnings.warn(f"{path}: damaged; the tokenizer is trained anew", stacklevel=3)
        return None
    return data.decode()


def _byte_level_length(token: str) -> int:
    # The byte-level alphabet writes each byte as one character.
    return len(token)


def _word_length(token: str) -> int:
    return len(token.encode())


def _sentencepiece_length(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("▁", " ").encode())
