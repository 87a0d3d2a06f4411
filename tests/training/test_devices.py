"""Nothing is hard-wired to a device: what the model makes on its way lies where its inputs lie.

There is no GPU here. In its place every tensor that is made without saying where lands on another device than the
model's: torch's `meta`, which has no numbers, so that to compute with one of both, or to read it, is an error.
"""

import ast
from pathlib import Path

import pytest
import torch
from test_ranks import CASES, made

from models import ids
from undertow.serve import decode as serving

SOURCE = Path(__file__).parents[2] / "src" / "undertow"
ELSEWHERE = torch.device("meta")


def test_the_stand_in_finds_what_is_hard_wired():
    with ELSEWHERE, pytest.raises(RuntimeError):
        torch.cat([torch.zeros(2, device="cpu"), torch.zeros(2)])
    with ELSEWHERE, pytest.raises(RuntimeError):
        torch.randint(3, ()).item()


QUICK = {"drawn loop", "reuse map", "trm block", "coconut", "adjoint", "drawn sweeps, all read", "future heads"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_what_is_made_on_the_way_lies_with_the_inputs(name):
    """Loss, backward, decoding with a cache (ours and with beams, Hugging Face's), left pads, the server's steps."""
    model, x = made(name), ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    more = dict(attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=1)
    with ELSEWHERE:
        model(x, labels=x, attention_mask=mask).loss.backward()
        model(x, labels=x, skip_logits=True).loss.backward()
        model.eval().generate(x, **more)
        with torch.no_grad():
            logits, cache = serving.prefill(model, x.tolist())
            serving.step(model, [3, 4], cache)
    assert all(p.grad is None or p.grad.device == p.device for p in model.parameters())


def test_nothing_is_sent_to_a_device_by_name():
    """No `.cuda()`, `.to("cuda")` or `device="mps"` in the package."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = [word.value for word in node.keywords if word.arg == "device"]
                given += node.args if node.func.attr == "to" else []
                assert node.func.attr not in ("cuda", "mps"), (path, node.lineno)
                named = [a.value for a in given if isinstance(a, ast.Constant)]
                assert not set(named) & {"cuda", "cuda:0", "mps"}, (path, node.lineno)
