"""`analysis.show`: the picture has the right loops, edges and parts; the numbers are those of the model."""

import time

import pytest
import torch
from rich.console import Console

import undertow as ut
from models import CONFIGS, build
from undertow import recipe
from undertow.analysis import flops, label, show

PAIRS = [
    {},
    {"depth": ut.ReuseMap([2, 1, 3, 1])},
    {"depth": ut.MiddleLoop(1, 2, 3, inject=True), "time": ut.T2MLR(1, 2, carry="residual")},
    {"depth": ut.TRMBlock(-1, inner=2, outer=3), "time": ut.LRT(2)},
    {"depth": ut.BlockLoop(2, inject=True), "time": ut.LRT(1, shared=False)},
]


def on_meta(family: str = "llama", **methods) -> ut.UndertowForCausalLM:
    with torch.device("meta"):
        return ut.from_scratch(CONFIGS[family](), **methods)


def drawn(model) -> list[str]:
    return [row.drawn for row in show.picture(model)]


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize("methods", PAIRS, ids=str)
def test_every_step_is_drawn_once(methods):
    model = on_meta(**methods)
    rows = show.picture(model)
    assert rows[0].drawn == "embedding" and rows[-1].drawn.endswith("LM head")
    visits = [row for row in rows if row.numbers]
    assert sum(len(steps) for steps in _steps(visits)) == len(model.program.steps)
    edges = {edge for step in model.program.steps for entering in step.edges.values() for edge in entering}
    text = "\n".join(e for row in rows for e in row.edges)
    assert all(edge.mixer in text for edge in edges)
    assert all(text.count(f"→ memory {n}") == 1 for n in range(len(model.program.memories)))
    if not model.program.memories:
        assert {row.part for row in rows} == {""}


def _steps(rows) -> list[list[str]]:
    """The numbers of a row; `a, b .. z (n)` stands for n of them."""
    return [
        [""] * int(row.numbers.split("(")[1][:-1]) if "(" in row.numbers else row.numbers.split(", ") for row in rows
    ]


def test_loops_of_single_layers_stay_on_one_line():
    assert drawn(on_meta(depth=ut.ReuseMap([2, 1, 3, 1]))) == [
        "embedding",
        "layer 0 ↻ 2 times",
        "layer 1",
        "layer 2 ↻ 3 times",
        "layer 3",
        "final norm, LM head",
    ]


def test_nested_loops_are_bracketed_and_rounds_without_gradient_marked():
    rows = show.picture(on_meta(depth=ut.TRMBlock(-1, inner=2, outer=3)))
    assert [row.drawn for row in rows[5:]] == [
        "final norm",
        "╭ 2 times, no gradient",
        "│ ╭ 2 times",
        "│ │ trm_0",
        "│ │ trm_1",
        "│ ╰",
        "│ trm_0",
        "│ trm_1",
        "╰",
        "╭ 2 times",
        "│ trm_0",
        "│ trm_1",
        "╰",
        "trm_0",
        "trm_1",
        "LM head",
    ]
    inner, exit_visit = rows[8], rows[-2]
    assert inner.numbers == "5, 7, 11, 13" and inner.stream == "z + y + h → z" and inner.slots == "4 own"
    assert exit_visit.stream == "y → h" and exit_visit.edges == ("output ← out(final norm), Blend trm_gate",)
    assert rows[5].slots == ""


def test_edges_name_port_delay_source_mixer_and_rounds():
    model = on_meta(depth=ut.MiddleLoop(1, 2, 3, inject=True), time=ut.T2MLR(1, 2, carry="residual"))
    by_block = {row.drawn: row for row in show.picture(model)}
    assert by_block["│ layer 1"].edges == (
        "input ← memory 0 (t-1) through memory_projection, Gated memory_mixer, visit 1 of 3",
        "input ← out(layer 0), Add inject, visit 2, 3 of 3",
    )
    assert by_block["│ layer 2"].edges == ("→ memory 0",)
    assert [by_block[b].part for b in ("layer 0", "│ layer 1", "layer 3")] == ["head", "span", "tail"]
    text = show.plain(model, T=32)
    assert "memory 0: out(layer 2), updated by Residual memory_carry; zero before the first token" in text
    assert "a sweep repeats the span: 6 of 8 blocks (head 1, tail 1)" in text
    keys = on_meta(time=ut.LRT(2))
    assert (
        "key, value ← memory 0 (t-1) through memory_key, memory_value, HeadGate gate_1" in show.picture(keys)[2].edges
    )
    assert "memory 0: RMS norm of out(layer 2)" in show.plain(keys, T=32)


def test_shared_slots_are_named():
    from dataclasses import replace

    model = on_meta(depth=ut.ReuseMap([2, 1, 1, 1]))
    steps = list(model.program.tail)
    steps[:2] = [replace(steps[0], slot="kv"), replace(steps[1], slot="kv", shares=True)]
    model.program = replace(model.program, tail=tuple(steps))
    assert show.picture(model)[1].slots == "kv, reads kv"


@pytest.mark.parametrize("family", ["llama", "gpt2", "nanochat"])
@pytest.mark.parametrize("methods", PAIRS, ids=str)
def test_parameter_count_by_part_is_complete(family, methods):
    for model in (on_meta(family, **methods), build(family, **methods)):
        *parts, total = show.parameters(model)
        assert total[1] == sum(n for _, n, _ in parts) == sum(p.numel() for p in model.parameters())
        ours = sum(n for _, n, _ in parts[4:])
        assert ours == sum(p.numel() for p in model.undertow.parameters())


def test_parameter_count_of_tied_embeddings_counts_once():
    parts = {name: (n, remark) for name, n, remark in show.parameters(on_meta("gpt2"))}
    assert parts["LM head"] == (0, "tied to the embedding")
    assert parts["embedding"][0] == 32 * (43 + 96)  # tokens and learned positions
    untied = {name: n for name, n, _ in show.parameters(on_meta("llama"))}
    assert untied["LM head"] == untied["embedding"] == 32 * 43


def test_costs_are_those_of_the_schedules():
    model, T = build(time=ut.T2MLR(1, 2)), 32
    found = show.costs(model, T)
    assert [cost.evaluations for cost in found] == [4 + 4 * 2, 4 + 3 * 2, 4 + 3 * 2, 4]
    assert found[0].name == f"training: {label(model.schedule)}" and "Converge(G=16) in 3 rounds" in found[1].name
    assert found[0].training == flops.training_flops(model, T) / T
    assert found[2].forward == flops.forward_flops(model, T, ut.Jacobi(3)) / T
    alone = show.costs(build(), T)
    assert [(cost.name, cost.relative) for cost in alone] == [("one sweep", 1.0)]
    model.schedule = ut.Converge(adjoint=2)
    assert show.costs(model, T)[0].evaluations == 4 + 4 * 2


def test_snapshot_of_a_small_model():
    model = build("gpt2", depth=ut.ReuseMap([1, 2, 1, 1]), time=ut.T2MLR(2, 3))
    lines = squeezed(show.plain(model, T=32))
    for line in (
        "gpt2: 4 layers, width 32, 4 heads x 8, vocabulary 43, 60.5k parameters; "
        "5 block evaluations per token when decoding",
        "part visit plan slots edges",
        "head 0 layer 0 own",
        "head 1, 2 layer 1 ↻ 2 times 2 own",
        "span 3 layer 2 own input ← memory 0 (t-1) through memory_projection, Gated memory_mixer",
        "span 4 layer 3 own → memory 0",
        "final norm, LM head",
        "memory 0: out(layer 3); zero before the first token of a document",
        "a sweep repeats the span: 2 of 5 blocks (head 3, tail 0)",
        "embedding 4,448",
        "4 layers 50,816",
        "LM head 0 tied to the embedding",
        "memory_mixer 4,162 Gated",
        "all 60,514",
        "per token, T = 32 blocks FLOPs forward FLOPs training x backbone",
        "cache: 2.56kB of keys and values per token in float64, 5 slots; a memory of 256B per sequence",
    ):
        assert line in lines, "\n".join(lines)


RECIPE = """
backbone: {family: llama, hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 22, num_attention_heads: 32}
time: T2MLR(6, 16)
data: {vocab_size: 32000, seq_len: 1024}
"""


def test_a_recipe_is_shown_without_weights(tmp_path):
    (tmp_path / "large.yaml").write_text(RECIPE)
    random = torch.get_rng_state()
    chosen = recipe.load(tmp_path / "large.yaml")
    show.render(recipe.load(tmp_path / "large.yaml").replace(name="warm"))
    begin = time.process_time()
    text = show.plain(chosen)
    assert time.process_time() - begin < 5  # half a second, on a machine that does nothing else
    assert "1.28G parameters" in text and "T = 1024" in text and text.startswith("large\n")
    assert torch.equal(torch.get_rng_state(), random)
    assert show.plain(tmp_path / "large.yaml") == text


def test_a_pretrained_recipe_needs_only_its_config(tmp_path):
    on_disk = tmp_path / "base"
    CONFIGS["gpt2"]().save_pretrained(on_disk)
    (tmp_path / "r.yaml").write_text(f"backbone: {{pretrained: {on_disk}}}\ntime: T2MLR(1, 2)\ndata: {{seq_len: 32}}\n")
    assert "60.5k parameters" in show.plain(tmp_path / "r.yaml")


def test_rich_draws_it():
    console = Console(width=100, force_terminal=True)
    with console.capture() as captured:
        console.print(show.render(on_meta(time=ut.T2MLR(1, 2)), T=32))
    assert "\x1b[" in captured.get() and "layer 3" in captured.get()
    with pytest.raises(ValueError, match="T"):
        show.render(on_meta(), T=0)
