"""What each position encoding costs in training: `python benchmarks/positions.py [OUT.json]`.

The published small model (d 128, 4 layers, 4 heads, MLP 512, vocabulary 1024) with the reuse map [4, 2, 1, 1]: forward,
backward, clip and AdamW on 4 random texts of 256 and of 1,024 tokens, float32, one thread. Every round times each
encoding once, so that whatever else the machine does hits all of them; ratios are of medians over the rounds, and of
the fastest rounds. Hugging Face's own Llama of 8 layers does the same number of layer evaluations.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import undertow as ut
from undertow.backbone import UndertowLlamaConfig
from undertow.backbone.positions import POSITIONS

SIZES = dict(
    hidden_size=128, num_attention_heads=4, intermediate_size=512, vocab_size=1024, max_position_embeddings=1024
)
MAP, BATCH = [4, 2, 1, 1], 4
RUNS = {256: 15, 1024: 5}  # tokens a text -> rounds
PUBLISHED = {"cope": 2.9, "fire": 1.26}  # the released code at 256 tokens, times its own rope, measured in the same way


def step(model: torch.nn.Module, length: int) -> Callable[[], float]:
    """One training step of this model, which returns its seconds."""
    optimiser, x = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randint(1024, (BATCH, length))

    def run() -> float:
        start = time.perf_counter()
        optimiser.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return time.perf_counter() - start

    return run


def compare(length: int, rounds: int) -> list[dict]:
    """One row an encoding, for texts of this length."""
    llama = LlamaConfig(**SIZES, num_hidden_layers=sum(MAP), tie_word_embeddings=True)
    steps = {"llama, 8 layers": step(AutoModelForCausalLM.from_config(llama).train(), length)}
    for position in POSITIONS:
        config = UndertowLlamaConfig(**SIZES, num_hidden_layers=len(MAP), position=position)
        steps[position] = step(ut.from_scratch(config, depth=ut.ReuseMap(MAP)).train(), length)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for counts in [False] * 2 + [True] * rounds:  # two rounds to warm up
        for name, run in steps.items():
            took = run()
            if counts:
                seconds[name].append(took)
    median, fastest = statistics.median(seconds["rope"]), min(seconds["rope"])
    return [
        {
            "position": name,
            "length": length,
            "rounds": rounds,
            "median_ms": round(1e3 * statistics.median(times), 1),
            "times_rope": round(statistics.median(times) / median, 3),
            "times_rope_fastest": round(min(times) / fastest, 3),
            "published_times_rope": PUBLISHED.get(name) if length == 256 else None,
        }
        for name, times in seconds.items()
    ]


def main(out: str | None = None):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for length, rounds in RUNS.items() for row in compare(length, rounds)]
    line = "{length:5d} {position:16s} {median_ms:8.1f} ms  {times_rope:.3f} x rope (fastest {times_rope_fastest:.3f})"
    for row in rows:
        print(line.format(**row))
    if out:
        about = {
            "command": f"python benchmarks/positions.py {out}",
            "torch": torch.__version__,
            "threads": 1,
            "batch": BATCH,
        }
        Path(out).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
