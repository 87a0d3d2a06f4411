"""What a run does when something goes wrong: damaged checkpoints, a full disk, numbers that are not finite, signals."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import losses, trained, weights
from transformers import TrainerCallback

from commands import call
from undertow.recipe import Recipe
from undertow.training import checkpoints, launch, optimisers, run, signals
from undertow.training.callbacks import read_metrics


@pytest.fixture(scope="module")
def sparse(values):
    """Values of a run that logs and evaluates seldom: sums are pending at nearly every step."""
    changed = {"log_every": 4, "accumulation": 2, "save_every": 3}
    return values | {
        "training": values["training"] | changed,
        "evaluation": {"points": 1, "rows": 4, "new_tokens": 2, "batch_size": 4},
    }


@pytest.fixture(scope="module")
def whole(sparse, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained(Recipe.parse(sparse), folder)
    return folder


class At(TrainerCallback):
    """Do something at the beginning of a step, counted from 1."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            self.do(model)


def same(folder, whole):
    """Weights, every logged line (but for speeds) and what was measured."""
    mine, expected = weights(folder), weights(whole)
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in expected)
    lines = [
        [{k: v for k, v in line.items() if "per_second" not in k} for line in read_metrics(place / "metrics.jsonl")]
        for place in (folder, whole)
    ]
    assert lines[0] == lines[1] and losses(folder)


# ---------------------------------------------------------------------- checkpoints


DAMAGE = {
    "flipped": lambda path, raw: path.write_bytes(
        raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
    ),
    "truncated": lambda path, raw: path.write_bytes(raw[:-1]),
    "empty": lambda path, raw: path.write_bytes(b""),
    "gone": lambda path, raw: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_of_a_checkpoint_is_checked(whole, tmp_path, damage):
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(whole / "checkpoints" / "checkpoint-8", folder)
    assert checkpoints.problem(folder) is None
    names = sorted(path.name for path in folder.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(names)
    for name in names:
        raw = (folder / name).read_bytes()
        DAMAGE[damage](folder / name, raw)
        assert checkpoints.problem(folder) is not None, name
        (folder / name).write_bytes(raw)
    assert checkpoints.problem(folder) is None


def test_a_flipped_bit_is_found_and_the_checkpoint_before_it_used(sparse, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    path = folder / "checkpoints" / "checkpoint-8" / "optimizer.pt"
    DAMAGE["flipped"](path, path.read_bytes())
    with pytest.warns(UserWarning, match="skipping checkpoint .*checkpoint-8: optimizer.pt is torn or changed"):
        trained(Recipe.parse(sparse), folder, resume=True)
    same(folder, whole)
    assert checkpoints.problem(path.parent) is None  # written again


@pytest.mark.parametrize("keep", [1, 2])
def test_rotation_keeps_what_was_just_written(tmp_path, keep):
    """A later one is there only because it was damaged: it neither counts nor stays."""
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    checkpoints.rotate(tmp_path, 6, keep)
    assert [checkpoints.step_of(path) for path in checkpoints.below(tmp_path)] == [4, 6][-keep:]
    assert (tmp_path / "checkpoint-mine").is_dir()


def test_changed_weights_of_a_finished_run_are_one_line(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "model" / "model.safetensors"
    DAMAGE["flipped"](path, path.read_bytes())
    for command in (["generate", folder, "a"], ["eval", folder]):
        status, _, errors = call(capsys, *command, "--device", "cpu")
        assert status == 2 and "model.safetensors is torn or changed" in errors and errors.count("\n") == 1


# ---------------------------------------------------------------------- a full disk


FULL = {
    "open": lambda path: OSError(errno.ENOSPC, "No space left on device", str(path)),
    "quota": lambda path: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "torch": lambda path: RuntimeError(
        "[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing"
    ),
}


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_one_line_and_leaves_whole_checkpoints(sparse, tmp_path, monkeypatch, error):
    save, folder = torch.save, tmp_path / "full"

    def full(value, path, *args, **kwargs):
        if "checkpoint-6" in str(path) and "scheduler" in str(path):
            raise FULL[error](path)
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full; the last whole checkpoint is .*checkpoint-3; make room"):
        trained(Recipe.parse(sparse), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert checkpoints.problem(folder / "checkpoints" / "checkpoint-3") is None


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), checkpoints.full_disk_said(tmp_path):
        raise RuntimeError("shape mismatch")


def test_files_that_may_not_grow_stop_the_command_with_one_line(sparse, tmp_path, capsys):
    """The system's own limit on a file's size, met by every library that writes."""
    Recipe.parse(sparse).save(tmp_path / "recipe.yaml")
    arguments = ["train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--device", "cpu"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        status, _, errors = call(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert "disk full; the last whole checkpoint is none" in errors
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
@pytest.mark.parametrize("size", [700, 900, 1100, 1300])
def test_a_disk_that_is_really_full(sparse, whole, tmp_path, capsys, size):
    """A file system of so many KiB, then the same run with room: it goes on from what was whole."""
    Recipe.parse(sparse).save(tmp_path / "recipe.yaml")
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size={size}k tmpfs {disk}"):  # noqa: S605
        pytest.skip("no leave to mount")
    command = ["train", tmp_path / "recipe.yaml", "--out", disk / "run", "--device", "cpu"]
    try:
        status, _, errors = call(capsys, *command)
        assert (
            status == 2 and errors.startswith("error: [Errno 28] disk full; the last whole") and "\n" not in errors[:-1]
        )
        found = checkpoints.below(disk / "run" / "checkpoints")
        assert all(checkpoints.problem(path) is None for path in found)
        assert not os.system(f"mount -o remount,size=20m {disk}")  # noqa: S605
        assert call(capsys, *command, "--resume")[0] == 0
        same(disk / "run", whole)
    finally:
        os.system(f"umount {disk}")  # noqa: S605


# ---------------------------------------------------------------------- not finite


def poison(model):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def test_nan_stops_with_one_line_and_keeps_the_batch(sparse, tmp_path, monkeypatch):
    folder, seen, collate = tmp_path / "nan", [], run.collate
    monkeypatch.setattr(run, "collate", lambda rows: seen.append(collate(rows)) or seen[-1])
    with pytest.raises(
        FloatingPointError, match=r"step 5: the loss is nan; .*checkpoint-3, the batch is .*step-5"
    ) as e:
        trained(Recipe.parse(sparse), folder, callbacks=[At(5, poison)])
    assert "\n" not in str(e.value)
    path = folder / "nonfinite" / "step-5.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "5", "what": "loss", "value": "nan"}
    assert torch.equal(load_file(path)["0.input_ids"], seen[8]["input_ids"])  # two micro-batches a step
    assert not (folder / "model").exists() and not (folder / "result.json").exists()


def infinite(model):
    """The gradient of one step overflows; the loss does not."""
    parameter = next(model.parameters())
    hook = parameter.register_hook(lambda grad: hook.remove() or grad * float("inf"))


def test_an_infinite_gradient_is_skipped_and_counted(sparse, tmp_path):
    """The run is the one in which that step's update was not taken."""
    skipping = Recipe.parse(sparse).replace("training", nonfinite="skip", log_every=1, save_every=100)
    before, after = {}, {}

    def keep(where):
        return lambda model: where.update({name: p.detach().clone() for name, p in model.named_parameters()})

    watch = [At(5, infinite), At(5, keep(before)), At(6, keep(after))]
    result = trained(skipping, tmp_path / "skip", callbacks=watch)
    assert all(torch.equal(after[name], before[name]) for name in before)
    lines = read_metrics(tmp_path / "skip" / "metrics.jsonl")
    assert result["skipped_steps"] == 1 and [line["step"] for line in lines if "skipped" in line] == [5]
    assert [step for step, _ in losses(tmp_path / "skip")] == [1, 2, 3, 4, 6, 7, 8]
    assert [path.name for path in (tmp_path / "skip" / "nonfinite").iterdir()] == ["step-5.safetensors"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "skip").values())


def test_the_logged_loss_leaves_skipped_steps_out(sparse, tmp_path):
    """Mean of the three steps that were taken; each alone is known from a run that logs every step."""
    skipping = Recipe.parse(sparse).replace("training", nonfinite="skip", max_steps=4, save_every=100)
    trained(skipping, tmp_path / "mean", callbacks=[At(3, infinite)])
    trained(skipping.replace("training", log_every=1), tmp_path / "each", callbacks=[At(3, infinite)])
    each = [loss for step, loss in losses(tmp_path / "each")]
    (_, first), (_, mean) = losses(tmp_path / "mean")  # the first step is logged alone
    assert len(each) == 3 and first == each[0]
    assert mean == pytest.approx(sum(each[1:]) / 2, rel=1e-6)


def test_it_stops_where_every_step_is_skipped(sparse, tmp_path, monkeypatch):
    monkeypatch.setattr("undertow.training.trainer.PATIENCE", 3)
    skipping = Recipe.parse(sparse).replace("training", nonfinite="skip", save_every=100)
    with pytest.raises(FloatingPointError, match="step 5: the loss is nan; 3 steps in a row were left out"):
        trained(skipping, tmp_path / "nan", callbacks=[At(3, poison)])


def test_weights_that_are_not_finite_are_never_saved(sparse, tmp_path):
    class Ruin(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                poison(model)

    with pytest.raises(FloatingPointError, match="step 6: the largest weight is nan.*checkpoint-3"):
        trained(Recipe.parse(sparse), tmp_path / "ruined", callbacks=[Ruin()])
    assert [path.name for path in (tmp_path / "ruined" / "checkpoints").iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["adamw", "muon", "nanochat"])
def test_no_gradient_is_no_update(sparse, name):
    """What a skipped step relies on: neither weights nor the optimiser's state change."""
    recipe = Recipe.parse(sparse).replace("training", optimiser=name)
    model = run.build_model(recipe)
    optimiser = optimisers.build(model, settings=recipe.training, batch_tokens=64)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimiser.step()
    before = [p.detach().clone() for p in model.parameters()]
    state = json.dumps(optimiser.state_dict(), default=lambda t: t.tolist())
    model.zero_grad()
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert json.dumps(optimiser.state_dict(), default=lambda t: t.tolist()) == state


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 6)])
def test_a_signal_ends_the_step_saves_and_leaves(sparse, whole, tmp_path, monkeypatch, capsys, number, step):
    """Step 2 has a loss that was not logged yet; the resumed run logs what the other one did."""
    Recipe.parse(sparse).save(tmp_path / "recipe.yaml")
    arguments = ["train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--device", "cpu"]
    train = run.train
    kill = At(step, lambda model: os.kill(os.getpid(), number))
    handled = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *a, callbacks, **k: train(*a, callbacks=[*callbacks, kill], **k))
        status, _, errors = call(capsys, *arguments)
    assert status == 128 + number and errors.count("\n") == 1
    assert f"stopped by {number.name}; step {step} is saved in" in errors and "--resume goes on" in errors
    assert checkpoints.newest_complete(tmp_path / "run" / "checkpoints").name == f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, handled)
    assert call(capsys, *arguments, "--resume")[0] == 0
    same(tmp_path / "run", whole)


def test_a_second_signal_acts_at_once_and_others_handlers_stay(monkeypatch):
    with signals.raised():
        with pytest.raises(signals.Stopped, match="stopped by SIGTERM") as caught, signals.held() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.number == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.status == 143
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with signals.raised(), signals.held() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1] and asked.number is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stopped_is_no_error():
    """Else a library that goes on after errors would go on."""
    assert not issubclass(signals.Stopped, Exception)


def test_workers_of_a_sweep_are_told_and_awaited(tmp_path):
    """One that saves on SIGTERM is let finish; the second signal ends one that does not listen."""
    code = (
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3); open(sys.argv[1], 'w').write('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    launch._end([process])
    assert process.returncode == 143 and (tmp_path / "x").read_text() == "saved"
    deaf = code.replace("save)", "signal.SIG_IGN)")
    process = subprocess.Popen([sys.executable, "-c", deaf, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    before = signal.signal(signal.SIGALRM, lambda *_: signals._raise(signal.SIGTERM, None))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(signals.Stopped):
            launch._end([process])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process.returncode == -signal.SIGKILL
