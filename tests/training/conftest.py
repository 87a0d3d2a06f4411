"""A tiny corpus, its data and a tiny recipe: what the training tests share."""

import inspect
import shutil
from pathlib import Path

import pytest

from undertow.recipe import Recipe

MODULES = (
    "ast",
    "bisect",
    "calendar",
    "codecs",
    "enum",
    "heapq",
    "inspect",
    "locale",
    "queue",
    "random",
    "sched",
    "uuid",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with a dozen text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        shutil.copy(inspect.getsourcefile(__import__(name)), folder / f"{name}.txt")
    return folder


@pytest.fixture(scope="session")
def values(corpus, tmp_path_factory) -> dict:
    """Plain values of a tiny recipe; with dropout, so that resuming needs the state of the generators."""
    return {
        "name": "tiny",
        "backbone": {
            "family": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
            "attention_dropout": 0.1,
        },
        "time": "T2MLR(0, 1)",
        "schedule": "Cyclic(4, 1)",
        "data": {
            "source": str(corpus),
            "vocab_size": 384,
            "seq_len": 32,
            "validation_rows": 8,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "training": {
            "max_steps": 8,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "save_every": 3,
            "log_every": 1,
            "precision": "float32",
            "tensorboard": False,
        },
        "evaluation": {"points": 2, "rows": 4, "new_tokens": 4},
    }


@pytest.fixture
def recipe(values) -> Recipe:
    return Recipe.parse(values)
