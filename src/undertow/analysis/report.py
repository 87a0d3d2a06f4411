"""`report.html`: a run or a comparison on one page that stands alone, drawn from the files of its folder.

Nothing is measured here but one thing: a run's `lens.json` (a validation text, read token by token) is made where it is
missing and the model is there. All else is what training left; what is not there is left out. The page needs no
network, follows light and dark, and reads on a phone; its template is `report.html` beside this file.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from undertow.analysis import paired
from undertow.analysis.charts import chart, curves
from undertow.analysis.columns import columns_of
from undertow.recipe import Recipe
from undertow.recipe import load as load_recipe
from undertow.training.callbacks import read_metrics
from undertow.training.launch import write_text

__all__ = ["page", "write", "write_all"]

READ = 96  # tokens of the text that is read
LENS = 8  # visits that the lens's table has room for
NUMBERS = (
    ("bits/byte, trained", "bits_training", "{:.4f}"),
    ("bits/byte, decoded", "bits_true", "{:.4f}"),
    ("problems solved", "solved", "{:.1%}"),
    ("parameters", "parameters", "{:,}"),
    ("training tokens", "tokens", "{:,}"),
    ("training FLOPs", "training_flops", "{:.3g}"),
    ("block evaluations a token", "layer_evaluations", "{:.4g}"),
    ("tokens/s, training", "training_tokens_per_second", "{:,.0f}"),
    ("tokens/s, generating", "generation_tokens_per_second", "{:,.0f}"),
)


def write(folder: str | Path, device: str = "auto", data=None, accept: bool = False) -> Path:
    """Write the report of a run's or a comparison's folder and return its path. No result file is changed.

    Args:
        device: where a run's model reads its text, if it has not yet.
        data: the run's data where it is open already.
        accept: let it read texts that are not those of the run, with a warning.

    Raises:
        ValueError: neither a run nor a comparison lies there.
        FileNotFoundError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / "recipe.yaml").exists() and (folder / "model").is_dir() and not (folder / "lens.json").exists():
        _read(folder, device, data, accept)
    path = folder / "report.html"
    write_text(path, page(folder))
    return path


def write_all(folder: Path, device: str = "auto", accept: bool = False) -> Path:
    """Write the reports of a comparison's finished runs, then its own, which links to them; returns its path."""
    from undertow.training import run as runs

    data = None
    for place in sorted(path.parent for path in folder.glob("*/result.json")):
        if data is None and not (place / "lens.json").exists():
            data = runs.reopen(place, load_recipe(place), accept)  # the same for all
        write(place, device, data, accept)
    return write(folder, device)


def page(folder: Path) -> str:
    """The text of a report, from the files that are there. Raises ValueError: neither a run nor a comparison."""
    from jinja2 import Environment, StrictUndefined

    if (folder / "table.json").exists():
        values = _comparison(folder)
    elif (folder / "recipe.yaml").exists():
        values = _run(folder)
    else:
        raise ValueError(f"{folder}: holds neither a run (recipe.yaml) nor a comparison (table.json)")
    empty: dict[str, Any] = dict.fromkeys(PARTS)
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    values["data"] = finite(values["data"])
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(template).render(empty | values)


PARTS = (
    "table", "failures", "paired", "pareto", "plan", "plans", "recipe", "curves", "more", "gap", "text", "samples",
    "costs", "environment", "command",
)  # fmt: skip


def finite(value):
    """Plain values in which every number is finite: JSON knows no other, so they become None."""
    if isinstance(value, Mapping):
        return {key: finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---------------------------------------------------------------------- a run


def _run(folder: Path) -> dict[str, Any]:
    result = _json(folder / "evaluation.json") or _json(folder / "result.json") or {}
    charts, shown, more = curves(read_metrics(folder / "metrics.jsonl"))
    reading = _json(folder / "lens.json")
    recipe, model = _opened(folder)
    values: dict[str, Any] = {
        "title": result.get("name") or (folder.resolve().name if recipe is None else recipe.name),
        "subtitle": _subtitle(folder, result),
        "numbers": [(name, said.format(result[key])) for name, key, said in NUMBERS if result.get(key) is not None],
        "recipe": (folder / "recipe.yaml").read_text(encoding="utf-8"),
        "file": "recipe.yaml",
        "curves": shown,
        "more": more,
        "samples": [{"name": "", **sample} for sample in result.get("samples", [])],
        "environment": result.get("environment"),
        "command": f"undertow train {shlex.quote(str(folder / 'recipe.yaml'))}",
    }
    if model is not None and recipe is not None:
        values |= {"plan": _plan(recipe), "costs": _costs(model, recipe.data.seq_len)}
    text = None
    if reading is not None:
        text, values["text"] = _text(reading)
    values["gap"] = _gap(result, reading, charts)
    return values | {"data": {"charts": charts, "text": text}}


def _subtitle(folder: Path, result: Mapping) -> str:
    said = [str(folder)]
    if "schedule" in result:
        said.append(f"trained under {result['schedule']}, {result['steps']:,} steps, seed {result['seed']}")
    elif not result:
        said.append("not finished")
    return " · ".join(said)


def _opened(folder: Path) -> tuple[Recipe | None, Any]:
    """The recipe of a run and its model without weights; a warning, and nothing, where it does not load any more."""
    from undertow.training.budget import on_meta

    try:
        recipe = load_recipe(folder)
        return recipe, on_meta(recipe)
    except (ValueError, OSError) as error:
        warnings.warn(f"{folder}: no plan and no costs in the report, the recipe does not load: {error}", stacklevel=2)
        return None, None


def _plan(recipe: Recipe):
    from markupsafe import Markup

    from undertow.analysis.drawing import svg

    return Markup(svg(recipe))  # made here, its texts escaped there


def _costs(model, T: int) -> list[dict]:
    from undertow.analysis import show

    short = show.short
    by_schedule = [
        (cost.name, f"{cost.evaluations:.4g}", short(cost.forward), short(cost.training), f"{cost.relative:.2f}")
        for cost in show.costs(model, T)
    ]
    head = (f"per token, T = {T}", "blocks", "FLOPs\nforward", "FLOPs\ntraining", "× plain")
    parts = [(name, f"{number:,}", remark) for name, number, remark in show.parameters(model)]
    return [
        {"head": head, "rows": by_schedule, "lines": show.decoding(model, T)},
        {"head": ("parameters", "", ""), "rows": parts, "lines": []},
    ]


def _gap(result: Mapping, reading: Mapping | None, charts: dict) -> dict | None:
    """Bits per byte under each schedule that was measured, and how far the memory is from the true one."""
    measured = result.get("evaluations", {})
    rows = [
        {"name": name, "bits": f"{found['bits_per_byte']:.4f}", "passes": f"{found['passes']:.3g}"}
        for name, found in measured.items()
        if found.get("passes") is not None
    ]
    shown, said = [], ""
    if result.get("bits_true") is not None and len(measured) > 1:
        said = f"Decoding truly costs {result['bits_true'] - result['bits_training']:+.4f} bits/byte. "
    if reading is not None and reading["distance"] is not None:
        far = [(n + 1, one["distance"]) for n, one in enumerate(reading["passes"])]
        charts["passes"] = chart("Distance of the memory, pass by pass", "passes", [("memory", far)], log=True)
        along = [("memory", list(enumerate(reading["distance"])))]
        charts["positions"] = chart("Distance of the memory, by position", "position", along, log=True)
        shown = ["passes", "positions"]
        said += f"Below, |M − M*| / |M*| on the text: {reading['schedule']} against true decoding."
    return {"rows": rows, "charts": shown, "said": said} if len(rows) > 1 or shown else None


def _text(reading: Mapping) -> tuple[dict, dict]:
    """What is drawn over the text, and the lens's table."""
    from undertow.analysis.reading import plain, some

    tokens, last = reading["tokens"], reading["visits"][-1]
    maps = [{"name": name, "values": values, "note": ""} for name, values in reading["gates"].items()]
    maps.sort(key=lambda one: " gate " not in one["name"])
    if reading["memory"] is not None:
        added = [None, *reading["memory"][:-1]]
        maps.append({"name": "what the memory adds to this token's log-probability", "values": added,
                     "note": "nats; blue where the memory helps, red where it harms"})  # fmt: skip
        far = reading["distance"]
        maps.append({"name": "distance of the memory from the true one", "values": far, "note": ""})
    lost = [None, *(None if logp is None else -logp for logp in last["logp"][:-1])]
    maps.append({"name": "loss on this token", "values": lost, "note": "nats"})
    for one in maps:
        one["values"] = [None if value is None else round(value, 6) for value in one["values"]]
    chosen = some(reading["visits"], LENS)
    rows = [
        {
            "token": plain(token),
            "cells": [
                {"best": plain(one["best"][t]), "right": t + 1 < len(tokens) and one["best"][t] == tokens[t + 1]}
                for one in chosen
            ],
        }
        for t, token in enumerate(tokens)
    ]
    lens = {"head": [one["name"].replace(", ", "\n") for one in chosen], "rows": rows}
    said = f"{len(tokens)} tokens: the beginning of the longest document in the first validation row. "
    said += "Gates are means over their channels, under true decoding."
    return {"tokens": tokens, "maps": maps}, {"said": said, "lens": lens}


def _read(folder: Path, device: str, data, accept: bool) -> None:
    """Let the model of a run read the beginning of its validation text and keep what it says in `lens.json`."""
    from undertow.analysis import reading
    from undertow.model import UndertowForCausalLM
    from undertow.training import run as runs

    loaded = runs.load(folder, device)
    if not isinstance(loaded.model, UndertowForCausalLM) or loaded.recipe is None:
        return
    row = (runs.reopen(folder, loaded.recipe, accept) if data is None else data).validation[0]
    parts = {name: reading.passage(row, READ, name) for name in ("input_ids", "memory_mask") if name in row}
    found = reading.read(loaded.model, loaded.tokenizer, **parts)
    runs.write_json(folder / "lens.json", found.to_dict())


# ---------------------------------------------------------------------- a comparison


def _comparison(folder: Path) -> dict[str, Any]:
    results: dict[str, list[dict]] = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    done = {name: [one for one in found if "failed" not in one] for name, found in results.items()}
    done = {name: found for name, found in done.items() if found}
    columns = columns_of(results.values())
    rows = [
        {"name": name, "cells": [cell(found) for _, cell in columns], "link": _link(folder, found)}
        for name, found in results.items()
    ]
    charts: dict[str, dict] = {}
    plans = [(name, *_opened(place_of(folder, found[0]))) for name, found in done.items() if _has_recipe(folder, found)]
    pareto = _pareto(done, {name: (model, recipe) for name, recipe, model in plans if model is not None}, charts)
    drawn = [{"name": name, "svg": _plan(recipe)} for name, recipe, _ in plans if recipe is not None]
    lines = _json(folder / "curves.json")
    if lines is not None:
        charts["curves"] = chart("Validation bits per byte", "training FLOPs", [])
        charts["curves"]["series"] = [
            {
                "name": name if len(runs) == 1 else f"{name}, seed {seed}",
                "points": [(point["flops"], point["bits_per_byte"]) for point in points],
                "colour": number,  # seeds of a model in its colour, all but the first dotted
                "again": points is not runs[0],
            }
            for number, (name, runs) in enumerate(lines["models"].items())
            for seed, points in zip(lines["seeds"], runs, strict=False)
        ]
    first = next(iter(done.values()), [{}])[0]
    failed = [one for found in results.values() for one in found if "failed" in one]
    file = folder / "comparison.yaml"
    gathered = [one["folder"] for found in results.values() for one in found if "folder" in one]
    again = ["undertow compare", shlex.quote(str(file))] if file.exists() else []
    again = ["undertow compare", *(shlex.quote(str(folder / one)) for one in gathered)] if gathered else again
    values = {
        "title": folder.resolve().name,
        "subtitle": f"{folder} · {len(results)} models, {max(map(len, results.values()), default=0)} seed(s)",
        "numbers": [],
        "table": {"head": ["model", *(title for title, _ in columns)], "rows": rows},
        "failures": [f"{one['name']}: {one['failed']}" for one in failed],
        "paired": paired.differences(done),
        "pareto": pareto,
        "plans": drawn,
        "curves": ["curves"] if lines is not None else None,
        "samples": _samples(done),
        "environment": first.get("environment"),
        "recipe": file.read_text(encoding="utf-8") if file.exists() else None,
        "file": file.name,
        "command": " ".join(again) or None,
    }
    return values | {"data": {"charts": charts, "text": None}}


def place_of(folder: Path, one: Mapping) -> Path:
    """The folder of a run of a comparison: what its result says, else (of those trained for it) its name."""
    return folder / one.get("folder", one.get("name", ""))


def _has_recipe(folder: Path, found: Sequence[Mapping]) -> bool:
    return (place_of(folder, found[0]) / "recipe.yaml").exists()


def _link(folder: Path, found: Sequence[Mapping]) -> str | None:
    """The report of a model's first run, where it is."""
    pages = [place_of(folder, one) / "report.html" for one in found]
    there = [os.path.relpath(page, folder) for page in pages if page.exists()]
    return quote(there[0]) if there else None


def _samples(done: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    return [{"name": name, **sample} for name, found in done.items() for sample in found[0].get("samples", [])]


def _pareto(done: Mapping[str, Sequence[Mapping]], opened: Mapping[str, tuple], charts: dict) -> list[str]:
    """Quality against training FLOPs and against FLOPs of a decoded token, a point a model (the mean over seeds)."""
    from undertow.analysis.flops import decode_flops

    key, title, better = paired.metric(done)
    measured = {name: [one[key] for one in found if one.get(key) is not None] for name, found in done.items()}
    quality = {name: statistics.mean(values) for name, values in measured.items() if values}
    training = {name: statistics.mean(one["training_flops"] for one in found) for name, found in done.items()}
    decoding = {name: float(decode_flops(model, recipe.data.seq_len)) for name, (model, recipe) in opened.items()}
    shown = []
    for name, label, cost in (
        ("pareto_training", "training FLOPs", training),
        ("pareto_decoding", "FLOPs of a decoded token", decoding),
    ):
        points = [(model, cost[model], value) for model, value in quality.items() if model in cost]
        if len(points) > 1:
            series = [(model, [(x, y)]) for model, x, y in points]
            made = chart(f"{title}; {label}", label, series, points=True)
            best = paired.frontier([(x, y) for _, x, y in points], better)
            made["series"].append({"name": "frontier", "points": best, "dash": True})
            charts[name] = made
            shown.append(name)
    return shown


def speaks() -> bool:
    """Whether this process writes reports: under torchrun one does."""
    return os.environ.get("RANK", "0") == "0"
