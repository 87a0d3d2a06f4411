"""`undertow train` on puzzles killed for real, again and again; checkpoints that are torn; modules imported alone."""

import contextlib
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_run as tiny
from safetensors.torch import load_file

import undertow.trm
from commands import call
from undertow.training.callbacks import read_metrics
from undertow.training.checkpoints import newest_complete
from undertow.trm import run
from undertow.trm.recipe import PuzzleRecipe

SPEEDS = ("seconds", "puzzles_per_second", "seconds_per_step")

SEVERAL = PuzzleRecipe.parse(tiny.merged(training={"steps": 12, "save_every": 5, "keep": 3, "evaluate_every": 0}))
TRAIN = """
import undertow.analysis.compare, undertow.training.progress, undertow.trm.run  # what takes long to load
from undertow_cli import main
print("ready", flush=True)
main()
"""


def everything(folder):
    """All tensors of a run (weights, average, moments, carry), and all its numbers but for speeds."""
    files = sorted(folder.rglob("*.safetensors"))
    assert [f.name for f in files if f.parent.name == "checkpoint-12"] == [
        "carry-0.safetensors",
        "training.safetensors",
    ]
    tensors = {f"{file.relative_to(folder)}/{n}": x for file in files for n, x in load_file(file).items()}
    values = [*read_metrics(folder / "metrics.jsonl"), json.loads((folder / "result.json").read_text())]
    return tensors, [{k: v for k, v in line.items() if k not in SPEEDS} for line in values]


def same(a, b):
    (tensors, numbers), (others, other_numbers) = everything(a), everything(b)
    assert tensors.keys() == others.keys() and all(x.equal(others[name]) for name, x in tensors.items())
    assert numbers == other_numbers


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(tmp_path, monkeypatch, capsys):
    recipe = PuzzleRecipe.parse(tiny.merged(training={"steps": 12}))
    recipe.save(tmp_path / "tiny.yaml")
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train = ["train", str(tmp_path / "tiny.yaml"), "--device", "cpu", "--resume", "--out"]
    command = [sys.executable, "-W", "ignore", "-c", TRAIN]
    assert call(capsys, *train, tmp_path / "whole")[0] == 0
    kills = 0
    while True:
        process = subprocess.Popen(
            [*command, *train, str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n", process.communicate()[1][-3000:]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=random.uniform(0, 1 + 2 * kills))  # longer each time: on a slow machine it ends, too
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors[-3000:]
        if process.returncode == 0:
            break
        kills += 1
    assert kills
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with several checkpoints."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERTOW_CACHE", str(root / "cache"))
        run.train(SEVERAL, root / "run", device="cpu")
    return root / "run"


@pytest.mark.parametrize(
    ("torn", "said"),
    [
        ("training.safetensors", "training.safetensors is torn or changed"),
        ("carry-0.safetensors", "carry-0.safetensors is torn or changed"),
        ("model/model.safetensors", "model/model.safetensors is torn or changed"),
        ("state.json", "state.json is torn or changed"),
        ("checksums.json", "checksums.json is missing or torn"),
    ],
)
def test_a_torn_checkpoint_is_skipped_and_the_run_ends_the_same(whole, tmp_path, monkeypatch, torn, said):
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    again = shutil.copytree(whole, tmp_path / "again")
    (again / "result.json").unlink()
    path = again / "checkpoints/checkpoint-12" / torn
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=f"checkpoint-12: {said}"):
        assert newest_complete(again / "checkpoints").name == "checkpoint-10"
    with pytest.warns(UserWarning, match=said):
        run.train(SEVERAL, again, resume=True, device="cpu")
    same(whole, again)


ALONE = """
import importlib, os, sys
import numpy, torch, pydantic, yaml, rich  # once for all of them; nothing that loads transformers' auto classes
assert "transformers.models.auto.modeling_auto" not in sys.modules and "undertow" not in sys.modules
for name in sys.argv[1:]:
    if not (child := os.fork()):
        importlib.import_module(name)
        from transformers import AutoConfig, AutoModelForCausalLM  # the latter is what registers
        AutoConfig.for_model("undertow")  # ours is registered, whatever was imported first
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} cannot be imported first")
"""


def alone(names):
    done = subprocess.run([sys.executable, "-c", ALONE, *names], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_executor_and_the_puzzle_model_can_be_imported_first():
    """Loading transformers' auto classes half way through one of our modules must not import the model at once."""
    alone(["undertow.trm.recursion"])  # its first import of ours that matters is the executor


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    found = [m.name for m in pkgutil.walk_packages(undertow.__path__, "undertow.")]
    assert "undertow.trm.training" in found
    alone(["undertow", *found])
