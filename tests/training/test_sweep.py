"""Sweeps: what a file says, who works on what, and that neither a kill nor a failure loses or repeats a run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from training_runs import losses, trained, weights

from commands import call
from undertow.analysis import results
from undertow.recipe import RecipeError
from undertow.training import launch, sweep
from undertow.training.callbacks import read_metrics

RECIPES = Path(__file__).parents[2] / "recipes"
BACKBONE = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BASE = {"backbone": BACKBONE, "training": {"max_steps": 3}}
NEVER = ("training_tokens_per_second", "generation_tokens_per_second")  # what no two runs have in common


class Quiet:
    """A watch that only keeps what it was told."""

    def __init__(self):
        self.ended, self.said, self.most = [], [], 0

    def running(self, lines):
        self.most = max(self.most, len(lines))

    def settled(self, name):
        self.ended.append(name)

    def say(self, text):
        self.said.append(text)


def until(condition):
    """Wait; a test that would hang fails."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def read(tmp_path, overrides=(), **values) -> sweep.Plan:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": BASE} | values, sort_keys=False))
    return sweep.load(tmp_path / "s.yaml", overrides)


# ---------------------------------------------------------------------- the file


def test_a_grid_is_the_product_of_recipes_and_values(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(BASE | {"seed": 7}))
    grid = {"training.learning_rate": [1e-3, 2e-5], "seed": [0, 1]}
    plan = read(tmp_path, recipes=["a.yaml", "b.yaml"], base=None, grid=grid, set={"training": {"batch_size": 2}})
    expected = [(m, rate, seed) for m in ("a", "b") for rate in (1e-3, 2e-5) for seed in (0, 1)]
    found = [(run.model, run.recipe.training.learning_rate, run.recipe.seed) for run in plan.runs.values()]
    assert found == expected and plan.keys == list(grid)
    assert list(plan.runs)[:3] == [f"a-learning_rate={v}" for v in ("0.001-seed=0", "0.001-seed=1", "2e-05-seed=0")]
    assert all(name == run.name == run.recipe.name for name, run in plan.runs.items())
    assert all(run.recipe.training.batch_size == 2 and run.recipe.training.max_steps == 3 for run in plan.runs.values())
    groups = [run.group for run in plan.runs.values()]
    assert len(set(groups)) == 4 and groups[0] == groups[1] == "a-learning_rate=0.001"


def test_excluded_points_and_single_runs(tmp_path):
    grid = {"depth": ["ReuseMap([2, 1])", None], "seed": [0, 1, 2]}
    plan = read(tmp_path, grid=grid, exclude=[{"depth": None, "seed": 1}, {"seed": 2}])
    assert list(plan.runs) == ["depth=ReuseMap_2_1-seed=0", "depth=ReuseMap_2_1-seed=1", "depth=none-seed=0"]
    assert plan.runs["depth=none-seed=0"].recipe.depth is None
    assert plan.runs["depth=ReuseMap_2_1-seed=1"].recipe.depth.counts == (2, 1)
    assert plan.runs["depth=none-seed=0"].curve == "base-depth=none"
    one = {"name": "wide", "set": {"backbone": {"hidden_size": 64}, "training.clip": 2.0}}
    plan = read(tmp_path, runs=[one])
    assert list(plan.runs) == ["wide"] and plan.runs["wide"].values == {
        "backbone.hidden_size": 64,
        "training.clip": 2.0,
    }
    assert plan.runs["wide"].recipe.backbone.hf_config().hidden_size == 64
    both = read(tmp_path, runs=[one], grid={"seed": [3]})
    assert list(both.runs) == ["seed=3", "wide"] and both.runs["wide"].group == "wide"
    assert list(read(tmp_path).runs) == ["base"]


def test_names_are_those_of_folders_and_no_two_are_alike(tmp_path):
    plan = read(
        tmp_path,
        grid={"data.source": ["a/../b c.txt", "a/.. b c.txt", ["x", "y"]], "time.start": [0]},
        set={"time": "T2MLR(0, 1)"},
    )
    name = "source=a_.._b_c.txt-start=0"
    assert list(plan.runs) == [name, f"{name}-2", "source=x_y-start=0"]
    keys = {"time.start": [0], "time.end": [0, 1], "training.warmup": [0.1], "training.recurrent_weight.warmup": [0.5]}
    plan = read(tmp_path, grid=keys, set={"time": "T2MLR(0, 1)"})
    assert "start=0-end=1-training.warmup=0.1-training.recurrent_weight.warmup=0.5" in plan.runs


def test_a_limit_of_the_sweep_replaces_those_of_the_recipe(tmp_path):
    plan = read(tmp_path, grid={"training.tokens_per_parameter": [1, 2.5]})
    assert plan.scales and [run.recipe.training.max_steps for run in plan.runs.values()] == [None, None]
    assert read(tmp_path, ["training.max_tokens=64"]).runs["base"].recipe.training.max_steps is None
    assert read(tmp_path, set={"training.clip": 2.0}).runs["base"].recipe.training.max_steps == 3
    assert not plan.runs["tokens_per_parameter=1"].curve.count("tokens")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"grids": {}}, "grids: unknown key (value {}); did you mean 'grid'?"),
        ({"grid": {"seed": []}}, "grid.seed: []: needs at least one value"),
        ({"grid": {"seed": [1, 1]}}, "grid.seed: [1, 1]: a value is given twice"),
        ({"grid": {"seed": 3}}, "grid.seed: 3: should be a valid list"),
        ({"grid": {"seed": [3]}, "set": {"seed": 4}}, "set.seed: is in the grid too"),
        ({"grid": {"name": ["x"]}}, "grid.name: cannot be swept"),
        ({"grid": {"training.lr": [1]}}, "run lr=1: training.lr: unknown key (value 1); did you mean"),
        ({"grid": {"training.learning_rate": ["x"]}}, "run learning_rate=x: training.learning_rate: 'x'"),
        ({"grid": {"seed.x": [1]}, "set": {"seed": 1}}, "run x=1: seed.x=1: seed is 1, not a section"),
        ({"set": {"training.max_steps": None}}, "run base: training: needs one of max_flops, max_tokens, max_steps"),
        ({"base": None}, "recipes: needs at least one, or a base"),
        ({"recipes": ["none.yaml"]}, "none.yaml: no such file"),
        ({"recipes": ["s.yaml"]}, "recipes: s.yaml is not a recipe of one model"),
        ({"base": {"backbone": {"family": "lama"}}}, "run base: backbone.family: 'lama' is not supported"),
        ({"grid": {"seed": [1]}, "exclude": [{"sed": 1}]}, "exclude: sed is not in the grid; did you mean 'seed'?"),
        ({"grid": {"seed": [1]}, "exclude": [{"seed": 2}]}, 'exclude: {"seed": 2} matches no point of the grid'),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "runs: a: there is a run of that name already"),
        ({"runs": [{"name": "a/b"}]}, "run a/b: name: 'a/b': must be usable as the name of a folder"),
        ({"runs": [{"name": "a", "recipe": "bas"}]}, "runs: a: recipe 'bas' is unknown; did you mean 'base'?"),
        ({"runs": [{"set": {}}]}, "runs.0.name: missing"),
        ({"where": "slrm"}, "where: 'slrm' is not allowed; did you mean 'slurm'?"),
        ({"workers": 0}, "workers: 0: should be greater than 0"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_every_mistake_is_one_line(tmp_path, values, line):
    if "recipes" in values:
        values = values | {"grid": {"seed": [1]}}
    with pytest.raises((RecipeError, FileNotFoundError)) as caught:
        read(tmp_path, **values)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert "s.yaml: " in str(caught.value) or isinstance(caught.value, FileNotFoundError)


def test_a_swept_key_cannot_be_set_beside(tmp_path):
    with pytest.raises(RecipeError, match="--set seed: is swept; change it in the file"):
        read(tmp_path, ["seed=3"], grid={"seed": [0, 1]})
    plan = read(tmp_path, ["training.max_steps=9"], grid={"seed": [0, 1]})
    assert [run.recipe.training.max_steps for run in plan.runs.values()] == [9, 9]


@pytest.mark.parametrize("path", sorted((RECIPES / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_load(path):
    plan = sweep.load(path)
    assert plan.name == path.stem and len(plan.runs) > 1
    if plan.scales:
        assert len({run.values[sweep.RATIO] for run in plan.runs.values()}) >= 4


# ---------------------------------------------------------------------- who works on what: workers without a model

STUB = """
import importlib.util, json, os, sys, time, types
from pathlib import Path

def train(recipe, place, resume, device):
    with (place / "starts.txt").open("a") as file:
        file.write("x")
    time.sleep(0.3)
    if "bad" in place.name:
        raise ValueError("two\\nlines")
    if "mute" in place.name:
        sys.stderr.write("a word\\nthe last word\\n")
        sys.stderr.flush()
        os._exit(3)
    if "killed" in place.name:
        os.kill(os.getpid(), 9)
    if "slow" in place.name:
        time.sleep(60)
    (place / "result.json").write_text(json.dumps({"seed": 0, "resumed": resume}))

torch, run, recipe, progress, undertow = map(types.ModuleType, ("torch", "run", "recipe", "progress", "undertow"))
torch.set_num_threads, run.train, progress.quiet = int, train, dict
undertow.__path__ = importlib.util.find_spec("undertow").submodule_search_locations  # its modules, without all it loads
recipe.load_any = lambda place: types.SimpleNamespace(runner=run)
sys.modules |= {"torch": torch, "undertow.training.run": run, "undertow.recipe": recipe}
sys.modules |= {"undertow": undertow, "undertow.training.progress": progress}
import undertow.training
undertow.recipe, undertow.training.run = recipe, run
from undertow.training import launch

sys.exit(launch._main(*sys.argv[1:]))
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Makes places; workers on them load nothing and "train" for a third of a second."""
    start = subprocess.Popen

    def popen(command, **keywords):
        assert command[1:3] == ["-m", "undertow.training.launch"]
        return start([sys.executable, "-c", STUB, *command[3:]], **keywords)

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch, "POLL", 0.02)

    def make(*names):
        places = {name: tmp_path / name for name in names}
        for place in places.values():
            place.mkdir(exist_ok=True)
        return places

    return make


def test_failures_are_recorded_and_the_others_go_on(stubs):
    places, watch = stubs("a", "bad", "mute", "killed", "b"), Quiet()
    launch.local(places, 2, 1, "cpu", watch)
    assert [launch.state(place) for place in places.values()] == ["finished", *["failed"] * 3, "finished"]
    assert sorted(watch.ended) == sorted(places) and watch.most == 2
    said = {
        name: json.loads((places[name] / "failed.json").read_text())["failed"] for name in ("bad", "mute", "killed")
    }
    assert said.pop("killed").startswith("killed by SIGKILL; ")
    assert said == {"bad": "two lines", "mute": "exit status 3: the last word"}
    assert "Traceback" in (places["bad"] / "log.txt").read_text()
    launch.local(places, 2, 1, "cpu", Quiet())  # all has been said already
    assert {(place / "starts.txt").read_text() for place in places.values()} == {"x"}


def test_two_sweeps_share_the_runs_of_a_folder(stubs):
    places = stubs(*"abcd")
    sweeps = [threading.Thread(target=launch.local, args=(places, 2, 1, "cpu", Quiet())) for _ in range(2)]
    for one in sweeps:
        one.start()
    for one in sweeps:
        one.join()
    assert {launch.state(place) for place in places.values()} == {"finished"}
    assert [(place / "starts.txt").read_text() for place in places.values()] == ["x"] * 4


def test_a_run_held_elsewhere_is_waited_for_and_taken_over(stubs):
    places, watch = stubs("a"), Quiet()
    lock = FileLock(places["a"] / "lock")
    lock.acquire()
    (places["a"] / "lock").write_text("17 on elsewhere\n")
    assert launch.state(places["a"]) == "held"
    with pytest.raises(Timeout):
        FileLock(places["a"] / "lock").acquire(blocking=False)
    worker = threading.Thread(target=launch.local, args=(places, 1, 1, "cpu", watch))
    worker.start()
    until(lambda: watch.said)
    assert "a (17 on elsewhere)" in watch.said[0] and not (places["a"] / "starts.txt").exists()
    lock.release()  # as the system does for a process that dies
    worker.join()
    assert launch.state(places["a"]) == "finished" and len(watch.said) == 1


def test_workers_die_with_whoever_started_them(stubs):
    places = stubs("slow")
    parent = multiprocessing.get_context("fork").Process(target=launch.local, args=(places, 1, 1, "cpu", Quiet()))
    parent.start()
    until((places["slow"] / "starts.txt").exists)
    assert launch.state(places["slow"]) == "held"
    pid = int((places["slow"] / "lock").read_text().split()[0])
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    until(lambda: launch.state(places["slow"]) != "held")
    assert launch.state(places["slow"]) == "open" and not _alive(pid)


def _alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_every_worker_sees_one_gpu():
    seen = [launch.environment(slot, 3, ["0", "1"]) for slot in range(3)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["0", "1", "0"]
    assert {env["OMP_NUM_THREADS"] for env in seen} == {"3"}
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert launch.environment(0, 1, []).get("CUDA_VISIBLE_DEVICES") == before


def test_the_newest_line_of_half_written_metrics(tmp_path):
    assert launch.newest(tmp_path) == {}
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_bits_per_byte": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    assert launch.newest(tmp_path) == lines[1]
    (tmp_path / "metrics.jsonl").write_text(" " * 70_000 + "\n" + text)
    assert launch.newest(tmp_path) == lines[1]


# ---------------------------------------------------------------------- real runs


def tiny(tmp_path, values, overrides=(), seeds=(0, 1), **more) -> sweep.Plan:
    """Runs of a few steps."""
    more = {"threads": 1, "set": {"evaluation": {"points": 1}}, "grid": {"seed": list(seeds)}} | more
    return read(tmp_path, overrides, base=values, **more)


def same(plan, folder, wholes):
    """Each run in the folder is the one that was never interrupted, bit for bit."""
    for name, run in plan.runs.items():
        place, whole = folder / "runs" / name, wholes(name, run)
        expected = weights(whole)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(place).items()), name
        assert losses(place) == losses(whole), name
        one, other = (json.loads((p / "result.json").read_text()) for p in (place, whole))
        assert {k: v for k, v in one.items() if k not in NEVER} == {k: v for k, v in other.items() if k not in NEVER}


@pytest.fixture(scope="module")
def wholes(values, tmp_path_factory):
    """The runs of `tiny`, each trained here in one go when it is first asked for."""
    folder = tmp_path_factory.mktemp("wholes")

    def whole(name, run):
        if not (folder / name).exists():
            trained(run.recipe, folder / name)
        return folder / name

    return whole


def begin(plan, folder, workers):
    """A sweep in a process of its own, forked: it has imported everything already."""
    made = multiprocessing.get_context("fork").Process(target=sweep.run, args=(plan, folder, Quiet(), workers, "cpu"))
    made.start()
    return made


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_bit_for_bit(tmp_path, monkeypatch, values, wholes):
    """Begun here and killed, gone on with as jobs of submitit (its debug executor: in this process)."""
    monkeypatch.setattr(launch, "SLURM_POLL", 0.01)
    plan, folder = tiny(tmp_path, values, seeds=[0]), tmp_path / "out"
    (place,) = (folder / "runs" / name for name in plan.runs)
    process = begin(plan, folder, 2)
    until(lambda: launch.newest(place).get("step", 0) >= 5)
    kill(process)
    until(lambda: launch.state(place) != "held")
    jobs = {"where": "slurm", "slurm": {"cluster": "debug", "timeout_min": 5}}
    rows = sweep.run(tiny(tmp_path, values, seeds=[0], **jobs), folder, Quiet(), device="cpu")
    same(plan, folder, wholes)
    assert [row["state"] for row in rows] == ["finished"] and results.read(folder) == rows

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert sweep.run(plan, folder, Quiet(), 2, "cpu") == rows  # all done: nothing starts
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before

    with pytest.raises(RecipeError, match=r"seed=0: cannot resume, training.clip is 1.0 there and 2.0 here"):
        sweep.prepare(tiny(tmp_path, values, ["training.clip=2.0"], seeds=[0]), folder, 1)
    with pytest.raises(RecipeError, match="cannot resume, threads is 1 there and 2 here"):
        sweep.prepare(tiny(tmp_path, values, seeds=[0], threads=2), folder, 1)
    assert sweep.prepare(tiny(tmp_path, values, seeds=[0], threads=None), folder, 1) == 1  # what it began with


def test_a_run_killed_after_its_last_step_takes_no_other(tmp_path, values, wholes):
    plan, folder = tiny(tmp_path, values, seeds=[0]), tmp_path / "out"
    ((name, one),) = plan.runs.items()
    shutil.copytree(wholes(name, one), folder / "runs" / name)
    for _ in range(2):
        (folder / "runs" / name / "result.json").unlink()
        launch.work(folder / "runs" / name, "cpu")
        same(plan, folder, wholes)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(4))
def test_killed_again_and_again_at_random_moments(tmp_path, values, wholes, trial):
    plan, folder = tiny(tmp_path, values), tmp_path / "out"
    chosen = random.Random(trial)
    for _ in range(4):
        process = begin(plan, folder, 2)
        step = chosen.randint(0, 8)  # before any, or soon after one
        place = folder / "runs" / chosen.choice(list(plan.runs))
        until(lambda p=process, f=place, s=step: launch.newest(f).get("step", 0) >= s or not p.is_alive())
        time.sleep(chosen.random() * (0.3 if step else 10))
        if process.is_alive():
            kill(process)
    sweep.run(plan, folder, Quiet(), 2, "cpu")
    same(plan, folder, wholes)


@pytest.mark.slow
def test_the_command_and_its_exit_status(capsys, tmp_path, monkeypatch, values):
    monkeypatch.chdir(tmp_path)
    grid = {"seed": [0], "training.learning_rate": [3e-3, 1e30]}
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump({"base": values, "grid": grid, "workers": 2}))
    status, out, err = call(capsys, "sweep", "rates.yaml", "--device", "cpu")
    assert status == 1, out + err
    assert "rates: 2 runs in runs/rates-1" in out and "learning_rate=1e+30: failed: step " in out
    rows = results.read(tmp_path / "runs/rates-1")
    assert [row["state"] for row in rows] == ["finished", "failed"] and "\n" not in rows[1]["failed"]
    status, out, err = call(capsys, "sweep", "rates.yaml", "--device", "cpu", "--resume")
    assert status == 1 and not (tmp_path / "runs/rates-2").exists()
    assert results.read(tmp_path / "runs/rates-1") == rows


def test_a_dry_run_lists_runs_and_costs_and_makes_nothing(capsys, tmp_path, monkeypatch, values):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"base": values, "grid": {"training.tokens_per_parameter": [1, 2]}})
    )
    status, out, err = call(capsys, "sweep", "r.yaml", "--dry-run")
    assert status == 0 and "r: 2 runs" in out and "training FLOPs" in out, err
    status, _, err = call(capsys, "sweep", "r.yaml", "--dry-run", "--set", "training.max_step=3")
    assert status == 2 and err.count("\n") == 1 and "training.max_step: unknown key" in err
    assert not (tmp_path / "runs").exists()
    plan = sweep.load("r.yaml")
    one, two = sweep.costs(plan)
    rows = values["training"]["batch_size"] * values["data"]["seq_len"]
    for cost, ratio in ((one, 1), (two, 2)):
        assert abs(cost["tokens"] - ratio * cost["scaling_parameters"]) <= rows / 2
        assert cost["training_flops"] == pytest.approx(cost["steps"] * one["training_flops"] / one["steps"])
    assert one["token_compute_multiplier"] == 2.0 and one["effective_compute"] == 2 * one["tokens_per_parameter"]


# ---------------------------------------------------------------------- submitit


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, 'slurm: Could not detect "srun"'),
        ({"cluster": "moon"}, "slurm: AutoExecutor doesn't know any executor named moon"),
        ({"cluster": "debug", "night": 1}, "slurm: Parameter 'night' need to be prefixed"),
        ({"cluster": "debug", "timeout_min": "x"}, 'slurm: Parameter "timeout_min" expected type'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_slurm_settings_are_one_line(tmp_path, settings, line):
    with pytest.raises(ValueError, match="slurm") as caught:
        launch.slurm({}, tmp_path / "slurm", settings, "cpu", 1, Quiet())
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_submitit_runs_jobs_in_processes(tmp_path, values, wholes):
    plan = tiny(tmp_path, values, where="slurm", slurm={"cluster": "local", "timeout_min": 10})
    sweep.run(plan, tmp_path / "out", Quiet(), 2, "cpu")
    same(plan, tmp_path / "out", wholes)


SBATCH = """#!/bin/bash
# A cluster of this machine: what the script's last line gives srun runs here, once for each task of the array.
for last; do :; done
cp "$last" {folder}/submitted.sh
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
for i in $(seq 0 ${{n:-0}}); do
  SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 \\
    SLURM_PROCID=0 SLURM_LOCALID=0 setsid bash "$last" >{folder}/job-$i.txt 2>&1 </dev/null &
done
echo Submitted batch job 7
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in --output|--error) shift 2;; *) shift;; esac
done
exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for i in 0 1; do echo "7_$i|RUNNING|here"; done
"""


@pytest.mark.slow
def test_jobs_on_a_pretended_slurm(tmp_path, monkeypatch, values, wholes):
    """The real path of submitit: sbatch, srun and sacct are scripts that run the jobs here."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in (("sbatch", SBATCH.format(folder=tmp_path)), ("srun", SRUN), ("sacct", SACCT)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    plan = tiny(tmp_path, values, where="slurm", slurm={"timeout_min": 10, "slurm_partition": "night"})
    sweep.run(plan, tmp_path / "out", Quiet(), 2, "cpu")
    same(plan, tmp_path / "out", wholes)
    submitted = (tmp_path / "submitted.sh").read_text()
    for line in ("--time=10", "--partition=night", "--array=0-1%2", "--job-name=out"):
        assert f"#SBATCH {line}" in submitted, submitted
    assert read_metrics(tmp_path / "out/runs/seed=0/metrics.jsonl")[-1]["step"] == 8
    assert set(json.loads((tmp_path / "out/slurm/jobs.json").read_text()).values()) == {"7_0", "7_1"}
