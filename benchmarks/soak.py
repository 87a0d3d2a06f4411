"""A run killed, asked to leave and damaged again and again: at its end it is, bit for bit, the run nothing happened to.

    python benchmarks/soak.py --faults 60

One tiny model is trained undisturbed. Then the same run meets faults, drawn from a seed, and goes on with `--resume`
after each, until so many faults have happened and the run at hand has ended: SIGKILL at a random moment, SIGKILL at a
random change of a file, SIGTERM and SIGINT at a random moment; and after each of them, now and then, damage to the
newest checkpoint: a flipped bit, a file cut short, a file removed. Every run that ends is compared: weights, every
logged number but speeds, and what was measured. Processes are forked from this one, which has loaded all it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from undertow.recipe import Recipe
from undertow.training import checkpoints
from undertow.training.callbacks import read_metrics

STEPS = 12
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
LEFT = {128 + signal.SIGTERM, 128 + signal.SIGINT}


def recipe(cache: Path) -> Recipe:
    """A run of a second or two, with dropout and micro-batches, so that resuming needs every state there is."""
    return Recipe.parse(
        {
            "name": "soak",
            "backbone": {
                "family": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "attention_dropout": 0.1,
            },
            "time": "T2MLR(0, 1)",
            "schedule": "Cyclic(4, 1)",
            "data": {"source": "S5(train=200, validation=8, test=8)", "seq_len": 64, "cache_dir": str(cache)},
            "training": {
                "max_steps": STEPS,
                "batch_size": 4,
                "accumulation": 2,
                "log_every": 4,
                "save_every": 2,
                "keep": 3,
                "precision": "float32",
                "tensorboard": False,
            },
            "evaluation": {"points": 1, "rows": 2, "new_tokens": 1, "records": 1, "batch_size": 4},
        }
    )


def start(file: Path, folder: Path, kill_at: int | None = None) -> int:
    """`undertow train --resume` in a forked process, which kills itself at its n-th change of a file; its pid."""
    pid = os.fork()
    if pid:
        return pid
    seen, place = 0, str(folder)

    def watch(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (writes or event in CHANGES) and str(arguments[0]).startswith(place):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        with (folder.parent / f"{folder.name}.txt").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if kill_at is not None:
            sys.addaudithook(watch)
        from undertow_cli import main

        main(["train", str(file), "--out", str(folder), "--resume", "--device", "cpu"])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def wait(pid: int) -> int:
    """Its exit status; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def damage(folder: Path, rng: random.Random) -> str | None:
    """Damage one file of the newest checkpoint, if an older whole one is there; says how."""
    found = checkpoints.below(folder / "checkpoints")
    if sum(checkpoints.problem(path) is None for path in found) < 2:
        return None
    path = rng.choice(sorted(path for path in found[-1].iterdir() if path.stat().st_size))
    raw, kind = bytearray(path.read_bytes()), rng.choice(["bit flipped", "cut short", "removed"])
    if kind == "removed":
        path.unlink()
        return kind
    at = rng.randrange(len(raw))
    if kind == "cut short":
        del raw[at:]
    else:
        raw[at] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return kind


def numbers(folder: Path) -> list[dict]:
    """Everything logged and measured, but for speeds."""
    values = [*read_metrics(folder / "metrics.jsonl"), json.loads((folder / "result.json").read_text(encoding="utf-8"))]
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in values]


def same(folder: Path, whole: Path) -> bool:
    """Whether two finished runs are one, bit for bit."""
    mine, other = (load_file(place / "model" / "model.safetensors") for place in (folder, whole))
    equal = mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in other)
    return equal and numbers(folder) == numbers(whole)


def soak(faults: int, seed: int, root: Path, say=print) -> dict:
    """Meet at least so many faults. Raises RuntimeError: a process failed of itself, or a run came out different."""
    rng, met, runs = random.Random(seed), Counter(), 0
    file, whole = root / "recipe.yaml", root / "whole"
    recipe(root / "cache").save(file)
    began = time.perf_counter()
    if wait(start(file, whole)) != 0:
        raise RuntimeError(f"the undisturbed run failed: {(root / 'whole.txt').read_text(encoding='utf-8')[-2000:]}")
    seconds = time.perf_counter() - began
    while met.total() < faults:  # a run meets several, and ends where none meets it in time
        folder = root / f"run-{runs}"
        while True:
            kind = rng.choice(["SIGKILL", "SIGKILL at a change of a file", "SIGTERM", "SIGINT"])
            if met.total() >= faults:
                kind = "none"
            pid = start(file, folder, rng.randint(1, 45) if "change" in kind else None)
            if kind in ("SIGKILL", "SIGTERM", "SIGINT"):
                until = time.perf_counter() + rng.uniform(0.05, 0.7) * seconds
                while (
                    time.perf_counter() < until
                    and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
                ):
                    time.sleep(0.005)
                os.kill(pid, signal.Signals[kind])
            status = wait(pid)
            if status == 0:
                break
            if status not in {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, *LEFT}:
                raise RuntimeError(
                    f"status {status}: {(root / f'{folder.name}.txt').read_text(encoding='utf-8')[-3000:]}"
                )
            met[kind] += 1
            hurt = damage(folder, rng) if rng.random() < 0.4 else None
            if hurt is not None:
                met[hurt] += 1
        if not same(folder, whole):
            raise RuntimeError(f"{folder} is not the run that nothing happened to (seed {seed})")
        runs += 1
        say(f"run {runs}: {met.total()} faults so far, bit for bit the same", flush=True)
    return {"faults": met.total(), "kinds": dict(sorted(met.items())), "runs": runs, "different": 0, "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    given = parser.parse_args()
    import transformers.trainer  # noqa: F401 (before forking: each child would load it)

    import undertow.training.run  # noqa: F401

    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        found = soak(given.faults, given.seed, Path(root))
    found |= {"steps": STEPS, "seconds": round(time.perf_counter() - began), "torch": torch.__version__}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
