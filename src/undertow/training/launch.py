"""Runs in processes of their own: here, several at a time, or as jobs on a Slurm cluster.

What is done is read off the folders alone: `result.json` (finished), `failed.json` (failed), and the lock, which a
working process holds until it dies. So whoever is killed, whenever, nothing is done twice, and several sweeps may work
on one folder. The lock is the system's (`flock`): it never outlives its process; the pid and host in its file are for
people. On a network file system it holds between hosts where that system has `flock`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from undertow.data import cache
from undertow.training import signals

State = Literal["finished", "failed", "held", "open"]
ENDS: dict[State, str] = {"finished": "result.json", "failed": "failed.json"}
HELD = 75  # exit status of a worker that found its run taken (sysexits' EX_TEMPFAIL)
POLL, SLURM_POLL = 0.2, 5.0  # seconds
UNNAMED = "held by another process"


class Watch(Protocol):
    """Who is told how far a sweep is."""

    def running(self, lines: Mapping[str, Mapping]) -> None:
        """The newest line of the metrics of every run that is being worked on (empty before the first)."""

    def settled(self, name: str) -> None:
        """A run has finished or failed."""

    def say(self, text: str) -> None:
        """A remark."""


def state(place: Path) -> State:
    """How far the run in a folder is; `held`: some process is working on it."""
    for name, end in ENDS.items():
        if (place / end).exists():
            return name
    try:
        with FileLock(place / "lock").acquire(blocking=False):
            return "open"
    except Timeout:
        return "held"


def record_failure(place: Path, line: str) -> None:
    """Write why a run failed, on one line."""
    write_text(place / "failed.json", json.dumps({"failed": " ".join(line.split())}))


def write_text(path: Path, text: str) -> None:
    """A file whole or not at all, whoever else writes it."""
    cache.write(path, lambda file: file.write(text.encode()))


def work(place: Path, device: str = "auto", threads: int | None = None) -> None:
    """Train the run in `place` (its `recipe.yaml`), or go on with it, unless another process does or has done so.

    Raises:
        Timeout: another process holds it.
        Exception: what made it fail, after it was recorded.
    """
    lock = FileLock(place / "lock")
    with lock.acquire(timeout=5):  # longer than `state` takes to look
        with suppress(PermissionError):  # Windows lets nobody write what is locked: then the holder has no name
            (place / "lock").write_text(f"{os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        if any((place / end).exists() for end in ENDS.values()):  # while this one waited for the lock
            return
        try:
            import torch

            from undertow import recipe

            if threads is not None:
                torch.set_num_threads(threads)
            chosen = recipe.load_any(place)
            chosen.runner.train(chosen, place, resume=(place / "checkpoints").is_dir(), device=device)
        except Exception as error:
            record_failure(place, str(error) or type(error).__name__)
            raise


class Job:
    """`work` as submitit wants it: before a time limit or a preemption the job is queued again, and goes on then."""

    def __call__(self, place: Path, device: str, threads: int | None) -> None:
        work(place, device, threads)

    def checkpoint(self, *arguments):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def local(places: Mapping[str, Path], workers: int, threads: int, device: str, watch: Watch) -> None:
    """Work on all runs in processes of this machine, `workers` at a time, until each has finished or failed.

    A worker dies with this process, however that dies; asked to leave, it ends its step and saves it first. Runs that
    another sweep holds are waited for.
    """
    gpus = _gpus() if device in ("auto", "cuda") else []
    running: dict[str, tuple[int, subprocess.Popen]] = {}
    waiting = False

    def tend(open_: Sequence[str], held: Sequence[str]) -> Sequence[str]:
        nonlocal waiting
        for name, (_, process) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode != HELD and state(places[name]) == "open":
                    record_failure(places[name], _last_words(places[name], process.returncode))
        for name in open_:
            if name not in running and len(running) < workers and state(places[name]) == "open":
                slot = min(set(range(workers)) - {slot for slot, _ in running.values()})
                running[name] = slot, _start(places[name], device, environment(slot, threads, gpus))
        if held and not running and not waiting:
            waiting = True
            watch.say(f"waiting for {', '.join(f'{name} ({_holder(places[name])})' for name in held)}")
        return list(running)

    try:
        _until_settled(places, tend, watch, POLL)
    except BaseException:
        watch.say(f"waiting for {', '.join(running) or 'nothing'} to leave; a second signal ends them at once")
        raise
    finally:
        _end([process for _, process in running.values()])


def slurm(
    places: Mapping[str, Path],
    folder: Path,
    settings: Mapping[str, Any],
    device: str,
    threads: int | None,
    watch: Watch,
) -> None:
    """Work on all runs as jobs of submitit, and wait until each has finished or failed.

    The jobs outlive this process; started again on the same folder, it finds those that are still queued or running.

    Args:
        folder: where submitit keeps its files; on a file system that the nodes share, like `places`.
        settings: of `AutoExecutor.update_parameters`; and `cluster`, "slurm" if not given.

    Raises:
        ValueError: submitit is not installed, there is no Slurm here, or a setting is wrong.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError('where: slurm needs submitit: pip install "undertow[slurm]"') from None

    values = {"name": folder.parent.name, **settings}
    cluster = values.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**values)
    except (ValueError, RuntimeError, NameError, AssertionError, TypeError) as error:
        raise ValueError(f"slurm: {' '.join(str(error).split())}") from None
    known = folder / "jobs.json"
    ids = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    open_ = [name for name, place in places.items() if state(place) in ("open", "held")]
    queued = [name for name in open_ if cluster == "slurm" and name in ids]
    jobs: dict[str, Any] = {name: submitit.SlurmJob(folder=folder, job_id=ids[name]) for name in queued}
    jobs = {name: job for name, job in jobs.items() if not job.done(force_check=True)}
    left = [name for name in open_ if name not in jobs and state(places[name]) == "open"]
    if left:
        with executor.batch():
            new = {name: executor.submit(Job(), places[name].absolute(), device, threads) for name in left}
        jobs |= new
        write_text(known, json.dumps(ids | {name: job.job_id for name, job in new.items()}))
    over: set[str] = set()

    def tend(open_: Sequence[str], held: Sequence[str]) -> Sequence[str]:
        for name in open_:
            if name in over:  # seen once already: files of another host may show late
                record_failure(places[name], f"job {jobs[name].job_id} ended without a result ({jobs[name].state})")
            elif name in jobs and jobs[name].done():
                over.add(name)
        return held

    _until_settled(places, tend, watch, SLURM_POLL)


Tend = Callable[[Sequence[str], Sequence[str]], Sequence[str]]


def _until_settled(places: Mapping[str, Path], tend: Tend, watch: Watch, poll: float) -> None:
    """Look at all runs again and again; `tend(open, held)` does what is to be done, and says which to show."""
    left = list(places)
    while True:
        found = {name: state(places[name]) for name in left}
        for name in [name for name in left if found[name] in ("finished", "failed")]:
            left.remove(name)
            watch.settled(name)
        if not left:
            watch.running({})
            return
        shown = tend(*([name for name in left if found[name] == one] for one in ("open", "held")))
        watch.running({name: newest(places[name]) for name in shown})
        time.sleep(poll)


def environment(slot: int, threads: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment of a worker: its threads and, where there are GPUs, one of them."""
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **gpu}


def newest(place: Path) -> dict:
    """The newest line with a loss in the metrics of a run; empty before the first."""
    path = place / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]  # the last one may be half written
    logged = [json.loads(line) for line in lines[-20:] if line.startswith(b"{") and b'"loss"' in line]
    return logged[-1] if logged else {}


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _start(place: Path, device: str, env: Mapping[str, str]) -> subprocess.Popen:
    """A worker on one run. Its standard input is a pipe that nobody writes to: it ends when this process does."""
    command = [sys.executable, "-m", "undertow.training.launch", str(place), device, env["OMP_NUM_THREADS"]]
    with (place / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=dict(env), start_new_session=True
        )


def _end(workers: Sequence[subprocess.Popen]) -> None:
    """Ask workers to leave and wait until they have; interrupted in that, kill them."""
    try:
        for process in workers:
            process.terminate()
        for process in workers:
            process.wait()
    finally:
        for process in workers:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    def wait():
        while os.read(0, 1):
            pass
        os._exit(1)  # at once: a run survives that at any moment

    threading.Thread(target=wait, daemon=True).start()


def _last_words(place: Path, status: int) -> str:
    """Why a worker died that could not say it itself."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; {place / 'log.txt'} says how far it came"
    lines = (place / "log.txt").read_text(errors="replace", encoding="utf-8").strip().splitlines()
    return f"exit status {status}: {lines[-1] if lines else 'nothing in its log'}"


def _holder(place: Path) -> str:
    with suppress(PermissionError):
        return (place / "lock").read_text(encoding="utf-8").strip() or UNNAMED
    return UNNAMED


def _main(place: str, device: str, threads: str) -> int:
    _die_with_parent()
    from undertow.training.progress import quiet

    quiet()  # people read the log
    try:
        with signals.raised():
            work(Path(place), device, int(threads))
    except Timeout:
        return HELD
    except signals.Stopped as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
