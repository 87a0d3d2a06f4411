"""What `undertow serve` does per second: `python benchmarks/serve.py benchmarks/results/serve.json`

Requests go over HTTP on this machine to a server in a process of its own: 1 or 8 clients at a time, each sending its
next request when the last one is answered. Models carry a state over time; every answer has NEW tokens (greedy, no end
token). Weights are random: the time does not depend on what is written. Latencies are of whole requests.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

NEW, PROMPT = 32, 32  # tokens
CLIENTS, REQUESTS = (1, 8), {1: 8, 8: 24}
SIZES = {"tiny": (64, 4, 512), "small": (384, 8, 4096)}  # width, layers, vocabulary


def save(folder: Path, size: str) -> int:
    """A model with random weights and its tokenizer; returns its parameters."""
    from pydoc_data.topics import topics

    import torch
    from transformers import LlamaConfig

    import undertow as ut
    from undertow.data import tokenizer as tokenizers
    from undertow.data.corpus import Document

    width, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers, num_attention_heads=width // 32,
        vocab_size=vocabulary, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = ut.from_scratch(config, time=ut.T2MLR(layers // 4, -1 - layers // 4))
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = 0  # the end token: never the likeliest
    model.save_pretrained(folder)
    text = Document("topics", "\n".join(topics.values()))
    tokenizers.train_tokenizer([text], vocabulary, folder / "cache").save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def ask(client, i: int, took: list[float]):
    """One request, timed."""
    prompt = [(7 * i + j) % 256 for j in range(1, PROMPT + 1)]
    began = time.perf_counter()
    reply = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": NEW, "temperature": 0})
    took.append(time.perf_counter() - began)
    reply.raise_for_status()
    assert reply.json()["usage"]["completion_tokens"] == NEW


def load(url: str, clients: int) -> dict:
    """So many clients at a time, until the requests are done."""
    import httpx

    left, took, lock = iter(range(REQUESTS[clients])), list[float](), threading.Lock()
    with httpx.Client(base_url=url, timeout=600) as client:
        for i in range(clients):
            ask(client, i, [])  # warm up

        def work():
            while True:
                with lock:
                    i = next(left, None)
                if i is None:
                    return
                ask(client, i, took)

        threads = [threading.Thread(target=work) for _ in range(clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.perf_counter() - began
    cuts = statistics.quantiles(took, n=20, method="inclusive")
    return {
        "clients": clients,
        "requests": len(took),
        "requests_per_second": len(took) / wall,
        "tokens_per_second": len(took) * NEW / wall,
        "latency_p50_ms": 1000 * statistics.median(took),
        "latency_p95_ms": 1000 * cuts[18],
    }


def main(out: str | None = None):
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            parameters = save(Path(folder), size)
            run = "from undertow_cli import main; main()"
            command = [sys.executable, "-c", run, "serve", folder, "--port", "0", "--batch", "8", "--device", "cpu"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
                assert server.stdout is not None
                url = next(line for line in server.stdout if " at http" in line).split()[2]
                for clients in CLIENTS:
                    rows.append({"model": size, "parameters": parameters, **load(url, clients)})
                    line = "{model:5s} {clients} at once: {requests_per_second:6.2f} requests/s  p50 "
                    line += "{latency_p50_ms:7.0f} ms  p95 {latency_p95_ms:7.0f} ms"
                    print(line.format(**rows[-1]), flush=True)
                server.terminate()
    if out:
        import torch

        about = {
            "command": f"python benchmarks/serve.py {out}",
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
            "load_average": os.getloadavg()[1],
            "new_tokens": NEW,
            "prompt_tokens": PROMPT,
        }
        Path(out).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
