"""What each position encoding costs in training: `python benchmarks/positions.py [OUT.json] [ROUNDS]`.

The published small model (d 128, 4 layers, 4 heads, MLP 512, vocabulary 1024) with the reuse map [4, 2, 1, 1]: forward,
backward, clip and AdamW on 4 random texts of 256 tokens, float32, one thread. Every round times each encoding once, so
that whatever else the machine does hits all of them; ratios are of medians over the rounds, and of the fastest rounds.
Hugging Face's own Llama of 8 layers does the same number of layer evaluations.
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
MAP, BATCH, LENGTH = [4, 2, 1, 1], 4, 256
PUBLISHED = {"cope": 2.9, "fire": 1.26}  # times its own rope, measured on the released code in the same way


def step(model: torch.nn.Module) -> Callable[[], float]:
    """One training step of this model, which returns its seconds."""
    optimiser, x = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randint(1024, (BATCH, LENGTH))

    def run() -> float:
        start = time.perf_counter()
        optimiser.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return time.perf_counter() - start

    return run


def main(out: str | None = None, rounds: str = "9"):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    llama = LlamaConfig(**SIZES, num_hidden_layers=sum(MAP), tie_word_embeddings=True)
    steps = {"llama, 8 layers": step(AutoModelForCausalLM.from_config(llama).train())}
    for position in POSITIONS:
        config = UndertowLlamaConfig(**SIZES, num_hidden_layers=len(MAP), position=position)
        steps[position] = step(ut.from_scratch(config, depth=ut.ReuseMap(MAP)).train())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for warm in [True] * 2 + [False] * int(rounds):
        for name, run in steps.items():
            took = run()
            if not warm:
                seconds[name].append(took)
    rope = seconds["rope"]
    rows = [
        {
            "position": name,
            "median_ms": round(1e3 * statistics.median(times), 1),
            "times_rope": round(statistics.median(times) / statistics.median(rope), 3),
            "times_rope_fastest": round(min(times) / min(rope), 3),
            "published_times_rope": PUBLISHED.get(name),
        }
        for name, times in seconds.items()
    ]
    for row in rows:
        print(
            "{position:16s} {median_ms:8.1f} ms   {times_rope:.3f} x rope (fastest {times_rope_fastest:.3f})".format(
                **row
            )
        )
    if out:
        about = {
            "command": "python benchmarks/positions.py OUT.json " + rounds,
            "torch": torch.__version__,
            "threads": 1,
        }
        Path(out).write_text(json.dumps({**about, "rounds": int(rounds), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
