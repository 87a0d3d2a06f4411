"""The cache residual `R_t = N(h_t + R_{t-1})` under sweeps: `python benchmarks/cache_residual.py [OUT.json]`.

T2MLR's residual is a long, almost undamped memory: D parallel sweeps cut it off at about D tokens, and D rounds over G
subsets at about D G. `settle` runs the carry to the end of the text after every sweep. The model is the published
measurement's (8 layers, width 256, span 2..5, random weights, outer gate tanh(g), residual and its norm on); the error
is max |logit difference to the true recurrence| / mean |logit|, in float32.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

import undertow as ut
from undertow.analysis import label

SCHEDULES = [
    ut.Jacobi(3),
    ut.Jacobi(7),
    ut.Jacobi(15),
    ut.Jacobi(3, settle=True),
    ut.Jacobi(7, settle=True),
    ut.Jacobi(15, settle=True),
    ut.Cyclic(8, 3),
    ut.Cyclic(16, 7),
    ut.Cyclic(64, 3),
    ut.Converge(G=64),
]


def build(gate: float) -> ut.UndertowForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4
    )
    model = ut.from_scratch(config, time=ut.T2MLR(2, 5, carry="residual", mixer_options={"gain": 1e-2})).eval()
    with torch.no_grad():
        model.undertow["memory_mixer"].scale_m.fill_(gate)
        model.undertow["memory_mixer"].scale_x.fill_(-0.2)
        torch.nn.init.orthogonal_(model.undertow["memory_projection"].weight)
    return model


@torch.no_grad()
def main(out: str | None = None):
    torch.set_num_threads(1)
    found = []
    for gate in (0.02, 0.1, 0.3, 3.0):
        model, x = build(gate), torch.randint(512, (2, 512), generator=torch.Generator().manual_seed(0))
        true = model(x, schedule=ut.Sequential()).logits
        for schedule in SCHEDULES:
            got = model(x, schedule=schedule)
            error = float((got.logits - true).abs().max() / true.abs().mean())
            found.append({"gate": gate, "schedule": label(schedule), "passes": got.passes, "error": error})
            print("gate {gate}  {schedule:28s} {passes:5.1f} passes  error {error:.1e}".format(**found[-1]))
    if out:
        Path(out).write_text(
            json.dumps({"command": "python benchmarks/cache_residual.py", "rows": found}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
