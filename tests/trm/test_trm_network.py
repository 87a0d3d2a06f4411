"""The puzzle model against the published computation written out; its sizes; what is saved."""

import json

import pytest
import tiny_trm as tiny
import torch
import written_out
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from undertow.backbone import Shape
from undertow.methods import METHODS
from undertow.methods.recursion import recursion
from undertow.plan import Loop, unroll
from undertow.trm import recursion as trm_recursion
from undertow.trm.config import Network, TRMConfig
from undertow.trm.model import TRM
from undertow.trm.network import normal_

CASES = {
    "trm": {},
    "one-cycle": {"outer": 1, "inner": 3},
    "three-cycles": {"outer": 3},
    "mlp": {"mixing": "mlp", "positions": "none"},
    "learned": {"positions": "learned"},
    "no-vectors": {"puzzle_width": 0},
    "wide-vectors": {"puzzle_width": 24},
    "odd-heads": {"heads": 3, "positions": "none"},
    "singlez": {"variant": "singlez"},
    "hier6": {"variant": "hier6", "inner": 3},
    "hrm": {"variant": "hrm", "layers": 1, "prefix": 1},
    "transformer": {"variant": "transformer", "layers": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_two_steps_are_the_loop_written_out_and_so_are_their_gradients(case):
    model, data = tiny.model(**CASES[case]), tiny.batch(3, 0)
    vectors = model.vectors(data["puzzle_identifiers"])
    results = []
    for step in (model, lambda *arguments: written_out.step(model, *arguments)):
        model.zero_grad()
        handed = None if vectors is None else vectors.detach().clone().requires_grad_()
        state = model.start(3)
        for _ in range(2):  # the second starts from what the first carries over
            state, logits, q = step(state, data["inputs"], handed)
            (logits.sin().sum() + q.cos().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((state, logits, q, gradients, None if handed is None else handed.grad))
    ours, theirs = results
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in ours[3].values())
    assert not any(value.requires_grad for value in ours[0].values())


def test_the_no_grad_cycles_carry_no_gradient():
    """With full gradient it would be another one: the comparison above can tell."""
    model, data = tiny.model(), tiny.batch(2, 0)
    gradients = []
    for grad_cycles in (1, 2):
        model.zero_grad()
        plan = recursion(model.recursion.blocks, 2, 2, grad_cycles=grad_cycles)
        model.program = trm_recursion.Recursion(plan, model.recursion.blocks, ("z", "y")).program()
        _, logits, _ = model(model.start(2), data["inputs"], model.vectors(data["puzzle_identifiers"]))
        logits.sin().sum().backward()
        gradients.append(model.tokens.weight.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_language_models_and_puzzles_share_one_recursion():
    """The block inside a language model visits what the puzzle model visits, in the same order, with the same cuts."""
    block = METHODS["TRMBlock"](insert=-1, layers=2, inner=6, outer=3)
    parts = block.build(Shape(1, 16, 2, 2, 8), False)
    names = {f"trm_{i}": f"block_{i}" for i in range(2)}
    theirs = unroll(parts.plan, 1, parts.blocks, ("z", "y"))[2:]
    ours = trm_recursion.of(Network()).program().steps
    seen = [(names[s.block], s.reads, s.grad) for s in theirs]
    assert seen == [(s.block, s.reads, s.grad) for s in ours] and len(ours) == 42
    assert sum(step.grad for step in ours) == 14 and isinstance(parts.plan[2], Loop)


SIZES = [  # spec: parameters without the puzzles' vectors, at d = 512 and at d = 128
    ("sudoku", {"seq_len": 81, "vocab_size": 11}, {}, 6_828_034),
    ("sudoku-mlp", {"seq_len": 81, "vocab_size": 11}, {"mixing": "mlp", "positions": "none"}, 5_028_866),
    ("singlez", {"seq_len": 81, "vocab_size": 11}, {"variant": "singlez"}, 6_828_034),
    ("hier6", {"seq_len": 81, "vocab_size": 11}, {"variant": "hier6"}, 6_828_034),
    ("hrm", {"seq_len": 81, "vocab_size": 11}, {"variant": "hrm", "layers": 4}, 27_275_266),
    ("plain", {"seq_len": 81, "vocab_size": 11}, {"variant": "transformer", "layers": 8, "heads": 12}, 27_144_194),
    ("maze", {"seq_len": 900, "vocab_size": 6}, {}, 6_822_914),
    ("arc", {"seq_len": 900, "vocab_size": 12}, {}, 6_829_058),
    ("arc-mlp", {"seq_len": 900, "vocab_size": 12}, {"mixing": "mlp", "positions": "none"}, 18_801_666),
    ("small", {"seq_len": 81, "vocab_size": 11, "width": 128, "heads": 4}, {}, 527_362),
    (
        "small-mlp",
        {"seq_len": 81, "vocab_size": 11, "width": 128},
        {"mixing": "mlp", "positions": "none"},
        694_274,
    ),
    (
        "small-hrm",
        {"seq_len": 81, "vocab_size": 11, "width": 128, "heads": 4},
        {"variant": "hrm", "layers": 4},
        2_100_226,
    ),
    (
        "small-plain",
        {"seq_len": 81, "vocab_size": 11, "width": 128, "heads": 4},
        {"variant": "transformer", "layers": 8},
        2_100_226,
    ),
    (
        "not-rounded",  # inner widths 43 over positions and 171
        {"seq_len": 16, "vocab_size": 6, "width": 64, "puzzle_width": 0},
        {"mixing": "mlp", "positions": "none", "round_to": 1},
        2 * 6 * 64 + 2 * (3 * 16 * 43 + 3 * 64 * 171) + 2 * 64 + 2,
    ),
]


@pytest.mark.parametrize("puzzle,network,count", [case[1:] for case in SIZES], ids=[case[0] for case in SIZES])
def test_parameters_are_as_many_as_published(puzzle, network, count):
    with torch.device("meta"):
        model = TRM(TRMConfig(**(puzzle | network)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_weights_start_as_published():
    model = TRM(tiny.config(width=64, vocab_size=200, inner=1))
    drawn = normal_(torch.empty(200_000), 0.5)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.01) and drawn.abs().max() <= 0.5 * 2 / 0.8796 + 1e-3
    assert model.tokens.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert model.blocks["block_0"].mlp.down.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert not model.q_head.weight.any() and (model.q_head.bias == -5).all() and not model.puzzles.table.any()
    assert not any("start" in name or "table" in name for name, _ in model.named_parameters())
    start = model.start(3)
    assert not start["y"].equal(start["z"]) and start["y"][0, 0].equal(start["y"][2, 6])


def test_only_the_first_prefix_token_holds_a_vector_as_wide_as_the_network():
    model = tiny.model()
    x = model.embed(torch.ones(1, tiny.L, dtype=torch.int64), torch.ones(1, 16, dtype=torch.float64))
    assert x.shape == (1, 2 + tiny.L, 16) and (x[0, 0] == 4).all() and not x[0, 1].any()


@pytest.mark.parametrize("variant", ["trm", "singlez", "hier6", "hrm", "transformer"])
def test_the_prefix_is_as_long_as_published(variant):
    """16 tokens, but in the two older models ceil(width of the vector / width); what a recipe says comes first."""
    for vector, needed in ((None, 1), (16, 1), (17, 2), (40, 3), (0, 0)):
        config = tiny.config(variant=variant, puzzle_width=vector, prefix=None, layers=1)
        assert config.prefixed == (needed if variant in ("hrm", "transformer") or vector == 0 else 16)
        assert config.tokens == tiny.L + config.prefixed
        model = TRM(config)
        vectors = model.vectors(torch.zeros(2, dtype=torch.int64))
        _, logits, _ = model(model.start(2), torch.ones(2, tiny.L, dtype=torch.int64), vectors)
        assert logits.shape == (2, tiny.L, tiny.V)
    assert tiny.config(variant=variant, prefix=5).prefixed == 5
    with pytest.raises(ValidationError, match="exceeds prefix"):
        tiny.config(variant=variant, prefix=1, puzzle_width=17)


@pytest.mark.parametrize(
    "wrong,said",
    [
        ({"puzzle_width": 40}, "exceeds prefix"),
        ({"heads": 3}, "odd width"),
        ({"mixing": "mlp"}, "only attention rotates"),
        ({"variant": "hier6", "inner": 7}, "six latents"),
        ({"variant": "hrm", "continue_loss": False}, "always trained"),
        ({"variant": "gru"}, "variant"),
        ({"width": 0}, "width"),
    ],
)
def test_wrong_networks_are_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        tiny.config(**wrong)


def test_a_saved_model_is_the_same_model(tmp_path):
    model, data = tiny.model(variant="hier6").float(), tiny.batch(2, 0)
    model.save(tmp_path)
    again = TRM.load(tmp_path)
    assert again.config == model.config and not again.training
    for one in (model, again):
        one.said = one(one.start(2), data["inputs"], one.vectors(data["puzzle_identifiers"]))[1]
    assert again.said.equal(model.said)

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the weights of this config.*head.weight"):
        TRM.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 3}))
    with pytest.raises(ValueError, match="config.json: seq_len: missing"):
        TRM.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        TRM.load(tmp_path / "elsewhere")
