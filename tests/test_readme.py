"""The README's code runs, and its commands exist; so do the examples."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from undertow_cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)  # noqa: S102
        assert names["text"].shape[1] > names["ids"].shape[1] and names["loss"].isfinite()


def test_commands_and_files_exist():
    verbs = {command.name for command in app.registered_commands}
    said = re.findall(r"^    undertow (\w+)", README, re.M)
    assert set(said) == verbs
    root = Path(__file__).parents[1]
    for path in re.findall(r"recipes/[\w/]+\.yaml|docs/[\w/]+\.\w+", README):
        assert (root / path).exists(), path


def test_methods_named_are_real():
    import undertow as ut

    for call in re.findall(r"^\| `(\w+\(.*?\))`", README, re.M):
        assert eval(f"ut.{call}", {"ut": ut})  # noqa: S307


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_examples_are_listed_and_are_notebooks():
    listed = (Path(__file__).parents[1] / "docs" / "examples.md").read_text()
    assert len(EXAMPLES) == 5
    for example in EXAMPLES:
        assert f"`examples/{example.name}`" in listed
        cells = re.split(r"^# %%", example.read_text(), flags=re.M)
        assert cells[0] == "" and cells[1].startswith(" [markdown]\n# # "), example.name
        assert sum(cell.startswith(" [markdown]") for cell in cells) >= 4, example.name
        assert not re.search(r"^# %% .*\n(?!#)", example.read_text(), re.M), "text cells are comments"


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.stem)
def test_examples_run(example):
    needed = {"grpo": "trl", "with_lightning": "lightning"}.get(example.stem)
    if needed is not None:
        pytest.importorskip(needed)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, example], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightning") is not None, reason="the example itself runs")
def test_the_lightning_example_without_lightning(monkeypatch, capsys):
    """A plain loop in Lightning's place: the example asks no more of it, and the model trains so."""

    class LightningModule(torch.nn.Module):
        def log(self, name, value):
            logged.append((name, float(value.detach())))

    class Trainer:
        def __init__(self, max_epochs, accelerator, **quiet):
            assert max_epochs == 1 and accelerator == "cpu" and not any(quiet.values())

        def fit(self, module, loader):
            optimiser = module.train().configure_optimizers()
            for index, batch in enumerate(loader):
                optimiser.zero_grad()
                module.training_step(batch, index).backward()
                optimiser.step()

    logged = []
    stand_in = types.SimpleNamespace(
        LightningModule=LightningModule, Trainer=Trainer, seed_everything=lambda seed, verbose: torch.manual_seed(seed)
    )
    monkeypatch.setitem(sys.modules, "lightning", stand_in)
    runpy.run_path(str(next(example for example in EXAMPLES if example.stem == "with_lightning")))
    assert len(logged) == 48 and logged[-1][1] < logged[0][1] and "guessing gives 0.693" in capsys.readouterr().out
