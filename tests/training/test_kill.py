"""`undertow train` killed for real (SIGKILL) at any moment, then resumed: the same metrics and weights, bit for bit.

Between moments that are only waited for, a process can also be told to kill itself at its n-th change of a file in the
run's or the cache's folder, which meets the moments that matter: half a checkpoint, half a cache, half a result.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import losses, trained, weights

import tiny_tasks
from commands import call
from undertow.recipe import Recipe
from undertow.tasks import TASKS
from undertow.training.callbacks import read_metrics

TESTS = Path(__file__).parents[1]
STREAM = {"source": "Pages(count=120)", "stream": True, "documents": 12}
SPEEDS = ("tokens_per_second", "training_tokens_per_second", "generation_tokens_per_second")

TRAIN = """
import os, signal, sys
import tiny_tasks
import undertow.training.run
from undertow_cli import main
from undertow.tasks import TASKS

TASKS.update(tiny_tasks.CLASSES)
kill_at, folder, seen = int(sys.argv.pop(1)), sys.argv.pop(1), 0
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}

def watch(event, arguments):
    global seen
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if (writes or event in CHANGES) and str(arguments[0]).startswith(folder):
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
print("ready", flush=True)
main()
"""


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, cls in tiny_tasks.CLASSES.items():
        monkeypatch.setitem(TASKS, name, cls)


class Runs:
    """A run that was never stopped, and one to kill: each with a cache of its own, which is killed too."""

    def __init__(self, values, source, root, **training):
        self.root = root
        data = {"seq_len": 32, "vocab_size": 300, **source}
        settings = values["training"] | {"log_every": 2, "save_every": 3} | training
        plain = values | {"training": settings, "evaluation": {"points": 1, "rows": 4, "new_tokens": 2}}
        for name in ("whole", "killed"):
            recipe = Recipe.parse(plain | {"data": data | {"cache_dir": str(root / name / "cache")}})
            (root / name).mkdir()
            recipe.save(root / name / "recipe.yaml")
        trained(Recipe.parse(plain | {"data": data | {"cache_dir": str(root / "whole/cache")}}), self.whole)

    @property
    def whole(self):
        return self.root / "whole" / "run"

    @property
    def killed(self):
        return self.root / "killed" / "run"

    def command(self):
        """What is typed to train or go on."""
        return ["train", self.killed.with_name("recipe.yaml"), "--out", self.killed, "--resume", "--device", "cpu"]

    def start(self, kill_at=-1):
        """`undertow train` in a process of its own, which has loaded what it needs; killed at a change of a file."""
        environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        arguments = [str(kill_at), str(self.killed.parent), *map(str, self.command())]
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TRAIN, *arguments],
            env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n", process.communicate()[1][-3000:]
        return process

    def check(self):
        """Weights, every logged number and the result are those of the run that was never stopped; speeds apart."""
        expected = weights(self.whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(self.killed).items())
        assert numbers(self.killed) == numbers(self.whole) and losses(self.killed)


def numbers(run):
    """Everything that was logged and measured, but for speeds."""
    values = [*read_metrics(run / "metrics.jsonl"), json.loads((run / "result.json").read_text())]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in values]


def stopped(process):
    """Whether it was killed; an error of its own fails the test."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), f"{said[-1000:]}\n{errors[-3000:]}"
    return process.returncode != 0


@pytest.mark.slow
def test_killed_while_it_trains_on_a_stream(values, tmp_path, capsys):
    runs = Runs(values, STREAM, tmp_path)
    process, seen = runs.start(), runs.killed / "metrics.jsonl"
    while process.poll() is None and not (seen.exists() and len(seen.read_text().splitlines()) >= 3):
        time.sleep(0.005)
    time.sleep(random.random() * 0.2)
    process.kill()
    stopped(process)
    assert (runs.killed / "checkpoints").is_dir()
    assert call(capsys, *runs.command())[0] == 0
    runs.check()


SOURCES = {"answers": {"source": "Sums()"}, "tags": {"source": "Parity()"}, "stream": STREAM}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_killed_at_random_moments_again_and_again(source, values, tmp_path):
    runs, kills = Runs(values, source, tmp_path, max_steps=12, save_every=2), 0
    while True:
        process = runs.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=random.uniform(0, 1 + kills))  # longer each time: on a slow machine it ends, too
        process.kill()
        if not stopped(process):
            break
        kills += 1
    assert kills
    runs.check()


@pytest.mark.slow
@pytest.mark.parametrize("source", [SOURCES["answers"], SOURCES["stream"]], ids=["answers", "stream"])
def test_killed_at_any_change_of_a_file(source, values, tmp_path):
    """First from the start on, in the caches and the first checkpoint; then one process goes on from another's end."""
    runs = Runs(values, source, tmp_path, keep=1)
    killed = [stopped(runs.start(kill_at=n)) for n in (1, 4, 9, 15, 18, 21, 24, 13, 22, 14, 10, 2)]
    assert sum(killed) >= 8
    assert not stopped(runs.start())
    runs.check()


@pytest.mark.slow
def test_the_watch_sees_what_changes(tmp_path):
    """Or the test above kills nothing."""
    script = TRAIN.replace("main()", f"open({str(tmp_path / 'a')!r}, 'w')")
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", script, "1", str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
