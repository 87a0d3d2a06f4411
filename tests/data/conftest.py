"""A folder of small texts, a tokenizer trained on them, and a cache folder nothing else writes to."""

import random

import pytest

from undertow.data import load_corpus, train_tokenizer

WORDS = [
    "the",
    "current",
    "beneath",
    "naïve",
    "surface",
    "流れ",
    "def f(x):\n    return 1",
    "🌊",
    "\t",
    "  ",
    "3.14",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """80 texts of 1 to 400 words in a folder with a subfolder."""
    root, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    (root / "sub").mkdir()
    for i in range(80):
        text = f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 400)))
        (root / ("sub" if i % 2 else "") / f"{i:02d}.txt").write_bytes(text.encode())
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(folder):
    return load_corpus(str(folder))


@pytest.fixture(scope="session")
def tokenizer(corpus, cache_dir):
    return train_tokenizer(corpus.train, 300, cache_dir)
