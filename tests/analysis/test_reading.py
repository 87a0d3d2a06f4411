"""A model reads a text: gates at each token, how far the schedule is, what is printed."""

import numpy as np
import pytest
import torch
from rich.console import Console

import undertow as ut
from models import V, build, gap, ids
from undertow.analysis import reading


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens):
        return "".join(chr(ord("A") + token) for token in tokens)


METHODS = {"depth": ut.ReuseMap([1, 2, 1, 1]), "time": ut.T2MLR(1, 2)}


@torch.no_grad()
def test_gates_are_those_of_single_tokens():
    """Positions one after the other through the cache: what the mixer gets and says, caught by a hook."""
    model, x = build("gpt2", **METHODS), ids(1)
    mixer, seen, cache = model.undertow["memory_mixer"], [], None
    hook = mixer.register_forward_hook(lambda _, xma, y: seen.append((*xma, y)))
    for t in range(x.shape[1]):
        cache = model(x[:, t : t + 1], past_key_values=cache, use_cache=True, schedule=ut.Sequential()).past_key_values
    hook.remove()
    found = reading.gates(model, x)
    assert set(found) == {"memory_mixer gate m", "memory_mixer gate x", "memory_mixer change"}
    for t, (a, m, own, y) in enumerate(seen):
        expected = {f"memory_mixer gate {name}": float(gate.mean()) for name, gate in mixer.gates(a, m, own).items()}
        expected["memory_mixer change"] = float((y - a).norm() / a.norm())
        assert {name: float(value[0, t]) for name, value in found.items()} == pytest.approx(expected, rel=1e-6)
    assert not mixer._forward_hooks and len(seen) == x.shape[1]


@torch.no_grad()
def test_a_reading_and_how_it_is_printed():
    model, x = build("gpt2", **METHODS), ids(1)[0]
    model.schedule = ut.Cyclic(4, 1)
    found = reading.read(model, Letters(), x)
    true, mine = (model(x[None], schedule=s) for s in (ut.Sequential(), ut.Cyclic(4, 1)))
    far = ((mine.memory - true.memory).norm(dim=-1) / true.memory.norm(dim=-1))[0]
    assert gap(torch.tensor(found.distance), far) < 1e-5 and found.passes[-1].distance == pytest.approx(
        float(far.mean()), rel=1e-5
    )
    assert found.passes[-1].nats == pytest.approx(float(model(x[None], labels=x[None], schedule=ut.Cyclic(4, 1)).loss))
    logp = torch.log_softmax(true.logits[0], -1)
    assert found.visits[-1].logp[:-1] == pytest.approx([float(logp[t, x[t + 1]]) for t in range(len(x) - 1)], rel=1e-6)
    assert found.visits[-1].logp[-1] is None and found.memory[-1] is None
    assert "".join(found.visits[-1].best) == Letters().decode(true.logits[0].argmax(-1).tolist())
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(reading.table(found, most=3))
    lines = captured.get().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("token")) + 1
    assert [line.split()[0] for line in lines[first : first + len(x)]] == list(found.tokens)
    assert "layer 3" in "".join(lines[:first]) and "layer 2" not in "".join(lines[:first])
    assert f"memory off by {found.passes[0].distance:.1e}" in captured.get()
    plain = reading.read(build("gpt2"), Letters(), x)
    assert plain.memory is None and plain.distance is None and plain.gates == {} and len(plain.passes) == 1
    for wrong in (x[:1], torch.zeros(97, dtype=torch.long)):
        with pytest.raises(ValueError, match="2 to 96"):
            reading.read(model, Letters(), wrong)


def test_the_passage_is_the_longest_document_without_pads():
    row = {
        "input_ids": np.arange(12),
        "attention_mask": np.array([0, 0, *[1] * 10]),
        "position_ids": np.array([0, 0, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1]),
    }
    assert reading.passage(row, 96).tolist() == [5, 6, 7, 8, 9]
    assert reading.passage(row, 3).tolist() == [5, 6, 7]
    assert reading.passage({"input_ids": np.arange(5) % V}, 96).tolist() == [0, 1, 2, 3, 4]


def test_some_are_evenly_spaced_with_the_last():
    assert reading.some(range(4), 6) == [0, 1, 2, 3]
    assert reading.some(range(31), 4) == [0, 10, 20, 30]
