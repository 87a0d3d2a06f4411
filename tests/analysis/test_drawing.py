"""The plan as an SVG: well formed, complete, in bounds, nothing of a user's unescaped."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
import yaml

import undertow as ut
from commands import call
from models import CONFIGS
from undertow.analysis import drawing, show
from undertow.recipe import Recipe

PAIRS = [
    {},
    {"depth": ut.ReuseMap([2, 1, 3, 1])},
    {"depth": ut.MiddleLoop(1, 2, 3, inject=True), "time": ut.T2MLR(1, 2, carry="residual")},
    {"depth": ut.TRMBlock(-1, inner=2, outer=3), "time": ut.LRT(2)},
    {"depth": ut.BlockLoop(2, inject=True), "time": ut.LRT(1, shared=False)},
    {"time": ut.Coconut()},
]
SVG = "{http://www.w3.org/2000/svg}"
VALUES = {
    "backbone": {"family": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 2},
    "data": {"vocab_size": 64, "seq_len": 16},
    "training": {"max_steps": 1},
}  # fmt: skip


def on_meta(**methods):
    with torch.device("meta"):
        return ut.from_scratch(CONFIGS["llama"](), **methods)


def drawn(model):
    return ET.fromstring(drawing.svg(model))


def numbers(path: str) -> list[float]:
    """How far right a path of M, H, V, L, m and l goes: the absolute ones' coordinates."""
    return [float(x) for x in re.findall(r"[ML](-?[\d.]+) |H(-?[\d.]+)", path) for x in x if x]


@pytest.mark.parametrize("methods", PAIRS, ids=str)
def test_all_that_runs_and_all_that_is_carried(methods):
    model = on_meta(**methods)
    root, rows, program = drawn(model), show.picture(model), model.program
    texts = [text.text for text in root.iter(f"{SVG}text")]
    boxes = [group for group in root.iter(f"{SVG}g")]
    assert len(boxes) == sum(1 for row in rows if row.steps) + 2  # and the embedding and the head
    assert [box.find(f"{SVG}text").text for box in boxes] == [row.drawn.lstrip("│ ") for row in rows if row.steps
        or not (row.loop or row.drawn.endswith("╰"))]  # fmt: skip
    loops = [row.loop for row in rows if row.loop and not row.steps]
    assert sorted(text[2:] for text in texts if text.startswith("↻ ")) == sorted(loops)
    edges = {edge for step in program.steps for entering in step.edges.values() for edge in entering}
    lanes = {(edge.memory, edge.delay) for edge in edges}
    assert texts.count("t−1") == len(program.memories) == sum(delay for _, delay in lanes)
    assert texts.count("t") == len(lanes) - len(program.memories)
    read = " ".join(text for text in texts if text.endswith("◂"))
    assert all(edge.port in read for edge in edges) and sum(text.endswith("▸") for text in texts) == len(lanes)
    shaded = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "span"]
    assert len(shaded) == bool(program.memories and program.span)


@pytest.mark.parametrize("methods", PAIRS, ids=str)
def test_nothing_leaves_the_picture(methods):
    root = drawn(on_meta(**methods))
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width <= 420, "a phone's width, about"
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for path in root.iter(f"{SVG}path"):
        assert max(numbers(path.get("d"))) < width
    assert all(float(text.get("y")) < height for text in root.iter(f"{SVG}text"))


def test_the_span_covers_its_boxes_and_no_others():
    model = on_meta(depth=ut.ReuseMap([1, 2, 1, 1]), time=ut.T2MLR(1, 2))
    root, rows = drawn(model), [row for row in show.picture(model) if row.steps]
    (band,) = (rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "span")
    top, bottom = float(band.get("y")), float(band.get("y")) + float(band.get("height"))
    for row, box in zip(rows, list(root.iter(f"{SVG}g"))[1:-1], strict=True):
        y = float(box.find(f"{SVG}rect").get("y"))
        assert (top < y < bottom) == (row.part == "span"), row


def test_names_are_escaped():
    recipe = Recipe.parse({**VALUES, "name": 'a<b>&"c'})
    text = drawing.svg(recipe)
    assert "<b>" not in text and 'a<b>&"c' in ET.fromstring(text).get("aria-label")


def test_of_the_command_line(capsys, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(VALUES | {"time": "T2MLR(0, 1)"}))
    status, out, err = call(capsys, "show", tmp_path / "tiny.yaml", "--svg", tmp_path / "plan.svg")
    assert status == 0 and "span" in out, err
    assert ET.parse(tmp_path / "plan.svg").getroot().tag == f"{SVG}svg"
