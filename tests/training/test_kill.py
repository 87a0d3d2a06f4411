"""`undertow train` killed for real (SIGKILL) at any moment, then resumed: the same metrics and weights, bit for bit.

Between moments that are only waited for, a process can also be told to kill itself at its n-th change of a file in the
run's or the cache's folder, which meets the moments that matter: half a checkpoint, half a cache, half a result.
"""

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
from undertow.cli import main
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
try:
    main()
finally:
    if kill_at == 0:
        print("changes:", seen)
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
        """`undertow train` in a process of its own. `kill_at` 0: it says at its end how often it changed a file."""
        environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        arguments = [str(kill_at), str(self.killed.parent), *map(str, self.command())]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TRAIN, *arguments],
            env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check(self):
        """Weights, every logged number and the result are those of the run that was never stopped; speeds apart."""
        expected = weights(self.whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(self.killed).items())
        metrics = [
            [timeless(line) for line in read_metrics(run / "metrics.jsonl")] for run in (self.whole, self.killed)
        ]
        assert metrics[0] == metrics[1] and losses(self.killed)
        results = [json.loads((run / "result.json").read_text()) for run in (self.whole, self.killed)]
        assert timeless(results[0]) == timeless(results[1])


def timeless(values):
    return {key: value for key, value in values.items() if key not in SPEEDS}


def stopped(process):
    """Whether it was killed; an error of its own fails the test."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), f"{said[-1000:]}\n{errors[-3000:]}"
    return process.returncode != 0


def test_killed_while_it_trains_on_a_stream(values, tmp_path, capsys):
    runs = Runs(values, STREAM, tmp_path)
    process, seen = runs.start(), runs.killed / "metrics.jsonl"
    while process.poll() is None and not (seen.exists() and len(seen.read_text().splitlines()) >= 3):
        time.sleep(0.005)
    time.sleep(random.random() * 0.2)
    process.kill()
    stopped(process)
    assert (runs.killed / "checkpoints").is_dir() and not (runs.killed / "result.json").exists()
    assert call(capsys, *runs.command())[0] == 0
    runs.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", [{"source": "Sums()"}, {"source": "Parity()"}, STREAM], ids=["sums", "parity", "stream"]
)
def test_killed_at_random_moments_again_and_again(source, values, tmp_path):
    runs, draw, kills = Runs(values, source, tmp_path, max_steps=12, save_every=2), random.Random(), 0
    for _ in range(40):
        process = runs.start()
        try:
            process.wait(timeout=3 + 12 * draw.random())
        except subprocess.TimeoutExpired:
            process.kill()
        if not stopped(process):
            break
        kills += 1
    else:
        pytest.fail("never finished")
    assert kills or (runs.killed / "result.json").exists()
    runs.check()


@pytest.mark.slow
@pytest.mark.parametrize("source", [{"source": "Sums()"}, STREAM], ids=["sums", "stream"])
def test_killed_at_any_change_of_a_file(source, values, tmp_path):
    """Each process gets a little further than the last was allowed to; then one may finish."""
    runs = Runs(values, source, tmp_path, keep=1)
    kills = [runs.start(kill_at=n) for n in ()]
    for kill_at in (1, 2, 3, 5, 8, 13, 21, 4, 9, 16, 11, 25):
        process = runs.start(kill_at=kill_at)
        kills.append(stopped(process))
    assert sum(kills) >= 8
    while stopped(runs.start(kill_at=0)):
        pass
    runs.check()


def test_the_watch_sees_what_changes(tmp_path):
    """Or the test above kills nothing."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.replace("main()", f"open({str(tmp_path / 'a')!r}, 'w')"), "1", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == -signal.SIGKILL
