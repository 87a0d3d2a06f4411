"""What a comparison came to, as files: of models just trained, or of runs that are there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from undertow import recipe as recipes
from undertow.analysis.columns import columns_of
from undertow.data import cache


def gather(places: Sequence[Path], folder: Path) -> dict[str, list[dict]]:
    """A comparison of runs that are finished, in `folder`: nothing is trained, no run is changed.

    Runs that differ in nothing but the seed are one model.

    Args:
        places: folders of runs; one of a comparison stands for all its runs.
        folder: where `table.json` and all that `write` writes go.

    Raises:
        ValueError: a folder without a finished run; runs on different data; two models of one name.
    """
    found = [run for place in places for run in ([place] if (place / "recipe.yaml").exists() else _runs(place))]
    results: dict[str, list[dict]] = {}
    folders: dict[str, list[Path]] = {}
    names: dict[str, str] = {}
    common = None
    for place in found:
        if not (place / "result.json").exists():
            raise ValueError(f"{place}: not a finished run (no result.json)")
        recipe = recipes.load_any(place)
        common = common or (place, recipe.common)
        for key, value in recipe.common.items():
            if common[1].get(key) != value:
                raise ValueError(f"{place}: its {key} is not that of {common[0]}; one comparison has one {key}")
        same = json.dumps({k: v for k, v in recipe.to_dict().items() if k not in ("name", "seed")}, sort_keys=True)
        name = names.setdefault(same, recipe.name.removesuffix(f"-seed{recipe.seed}"))
        if list(names.values()).count(name) > 1:
            raise ValueError(f"{place}: another model is called {name!r}, too; set name: in its recipe.yaml")
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        results.setdefault(name, []).append(result | {"folder": os.path.relpath(place, folder)})
        folders.setdefault(name, []).append(place)
    cache.write(folder / "table.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    write(folder.resolve().name, folder, results, folders)
    return results


def _runs(place: Path) -> list[Path]:
    """The finished runs below a folder. Raises ValueError: there are none."""
    found = sorted(path.parent for path in place.glob("*/result.json"))
    if not found:
        raise ValueError(f"{place}: holds no finished run (no recipe.yaml, and no */result.json)")
    return found


def write(name: str, folder: Path, results: Mapping, folders: Mapping[str, Sequence[Path]]) -> None:
    """Write `table.md` and, of models of text, `curves.json`, `curves.png` and `samples.md`."""
    columns = columns_of(results.values())
    head = ["model", *(title.replace("\n", " ") for title, _ in columns)]
    rows = ([model, *(cell(found) for _, cell in columns)] for model, found in results.items())
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    (folder / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    if any("exact_accuracy" in result for found in results.values() for result in found):
        return  # of puzzles
    from undertow.analysis import plots
    from undertow.training.callbacks import read_metrics

    points = {
        model: [
            [
                {"flops": line["flops"], "tokens": line["tokens"], "bits_per_byte": line["eval_bits_per_byte"]}
                for line in read_metrics(place / "metrics.jsonl")
                if "eval_bits_per_byte" in line
            ]
            for place in places
        ]
        for model, places in folders.items()
    }
    seeds = [result.get("seed") for result in max(results.values(), key=len)]
    (folder / "curves.json").write_text(json.dumps({"seeds": seeds, "models": points}, indent=1), encoding="utf-8")
    plots.curves(points, folder / "curves.png", title=name)
    text = [f"# Samples: {name}\n"]
    samples = {model: found[0].get("samples", []) for model, found in results.items()}
    for number, first in enumerate(next((s for s in samples.values() if s), [])):
        text.append(f"\nPrompt {number + 1}:\n{_fenced(first['prompt'])}")
        text += [f"\n{model}:\n{_fenced(made[number]['text'])}" for model, made in samples.items() if made]
    (folder / "samples.md").write_text("".join(text), encoding="utf-8")


def _fenced(text: str) -> str:
    return f"\n~~~~text\n{text}\n~~~~\n"
