"""From the runs of comparisons to what is kept of them: `python comparisons/report.py [NAME...]`.

Reads runs/comparisons/NAME/table.json (what `undertow compare comparisons/NAME.yaml --out runs/comparisons/NAME` left,
finished or not), writes comparisons/results/NAME.json (and NAME.png, accuracy by difficulty, of a task), and sets the
tables in docs/results.md between their marks. Differences are taken seed by seed: against the baseline trained on as
many tokens, and against the one trained with as many FLOPs (within a percent). The sweeps `twins` and `scaling` are
read from runs/NAME, the `retrofit` from runs/retrofit; their tables have no differences.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
KEPT = (
    "seed",
    "parameters",
    "layer_evaluations",
    "schedule",
    "steps",
    "tokens",
    "training_flops",
    "bits_training",
    "bits_true",
    "accuracy",
    "exact_accuracy",
    "failed",
    "solved",
    "trained_parameters",
    "bits_text",
)
OTHERS = {  # not made by `undertow compare`: the command, and the columns of the table
    "twins": ("undertow sweep recipes/sweeps/twins.yaml --out runs/twins", ("parameters", "tokens", "training_flops")),
    "scaling": ("undertow sweep recipes/sweeps/scaling.yaml --out runs/scaling", ("parameters", "tokens")),
    "retrofit": ("python recipes/retrofit/run.py --out runs/retrofit", ("trained_parameters", "steps")),
}
MEASURED = {  # what is measured, its title and digits; a column is there where any run has it
    "bits_true": ("bits/byte, decoded truly", 4),
    "solved": ("problems solved", 3),
    "bits_text": ("bits/byte of prose", 4),
}
BASELINES = ("baseline", "plain")  # how the names of models begin that others are compared with
MARK = re.compile(r"<!-- results: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def keep(runs: Path, name: str) -> dict | None:
    """What of a comparison's results is kept; None where it has not begun."""
    found = ran(runs, name)
    if not found:
        return None
    models = {
        model: [{key: result[key] for key in KEPT if result.get(key) is not None} for result in results]
        for model, results in found.items()
    }
    for result in [result for results in models.values() for result in results if "accuracy" in result]:
        if "exact_accuracy" in result:  # of puzzles; `accuracy` is that of cells
            result["solved"] = result["exact_accuracy"]
            continue
        ways = {key: way for key, way in result["accuracy"].items() if isinstance(way, dict)}
        result["solved"] = ways.get("generated", ways["exact"])["accuracy"]
        for way in ways.values():
            way.pop("shown", None)  # the texts that were looked at are not kept
    command = f"undertow compare comparisons/{name}.yaml --out runs/comparisons/{name}"
    return {"command": OTHERS[name][0] if name in OTHERS else command, "models": models}


def ran(runs: Path, name: str) -> dict[str, list[dict]]:
    """The results of all models of a comparison, a sweep or the retrofit; empty where it has not begun."""
    if name not in OTHERS:
        table = runs / name / "table.json"
        return json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    folder, found = runs.parent / name, {}
    if (folder / "pretrained.json").exists():
        found["as it comes"] = [{"seed": 0} | json.loads((folder / "pretrained.json").read_text(encoding="utf-8"))]
    if (folder / "table.json").exists():
        return found | json.loads((folder / "table.json").read_text(encoding="utf-8"))
    for row in (
        json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
        if (folder / "results.json").exists()
        else ()
    ):
        if "result" in row:
            found.setdefault(row["group"], []).append(row["result"])
    return found


def plain_table(models: dict[str, list[dict]], sizes: Sequence[str]) -> str:
    """Sizes and whatever was measured, without differences."""
    runs = [one for found in models.values() for one in found]
    shown = {key: how for key, how in MEASURED.items() if any(key in one for one in runs)}
    if "bits_text" in shown:  # then bits per byte of the task's own few rows say nothing
        shown.pop("bits_true", None)
    heads = ["model", *(size.replace("_", " ").replace("flops", "FLOPs") for size in sizes), "seeds"]
    heads += [title for title, _ in shown.values()]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for name, found in ((name, found) for name, found in models.items() if found):
        amounts = [found[0].get(size) for size in sizes]
        cells = [name, *("" if n is None else f"{n:,}" if n < 1e9 else f"{n:.3g}" for n in amounts), str(len(found))]
        cells += [spread(list(measured(found, key).values()), digits=digits) for key, (_, digits) in shown.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(found: Sequence[dict], key: str) -> dict[int, float]:
    """Seed -> value, of the runs that have it."""
    return {one["seed"]: one[key] for one in found if one.get(key) is not None}


def spread(values: Sequence[float], sign: bool = False, digits: int = 4) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def difference(found: Sequence[dict], reference: Sequence[dict] | None, key: str, digits: int) -> str:
    """The mean difference over the seeds that both have."""
    if reference is None or reference is found:
        return ""
    own, other = measured(found, key), measured(reference, key)
    return spread([own[seed] - other[seed] for seed in own if seed in other], sign=True, digits=digits)


def reference(models: dict[str, list[dict]], name: str, key: str, tolerance: float) -> list[dict] | None:
    """The baseline that got as much of `key` (`tokens`, `training_flops`) as the model `name`."""
    amount = models[name][0].get(key) if models[name] else None
    for other, found in models.items():
        plain = found and other.startswith(BASELINES) and not name.startswith(BASELINES)
        if plain and amount and abs(found[0].get(key, 0) / amount - 1) <= tolerance:
            return found
    return None


def table(kept: dict) -> str:
    """A comparison as a Markdown table."""
    for command, sizes in OTHERS.values():
        if kept["command"] == command:
            return plain_table(kept["models"], sizes)
    models = {name: found for name, found in kept["models"].items() if found}
    solved = any("solved" in one for found in models.values() for one in found)
    metric, digits = ("solved", 3) if solved else ("bits_true", 4)
    title = "problems solved" if solved else "bits/byte, decoded truly"
    heads = ["model", "parameters", "tokens", "training FLOPs", "seeds", title, "at equal tokens", "at equal FLOPs"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for name, found in models.items():
        values = list(measured(found, metric).values())
        equal = {
            key: difference(found, reference(models, name, key, tolerance), metric, digits)
            for key, tolerance in (("tokens", 1e-6), ("training_flops", 0.01))
        }
        first = found[0]
        cells = [
            name,
            f"{first['parameters']:,}" if "parameters" in first else "",
            f"{first['tokens']:,}" if "tokens" in first else "",
            f"{first['training_flops']:.3g}" if "training_flops" in first else "",
            str(len(values)) if values else "diverged",
            spread(values, digits=digits),
            equal["tokens"],
            equal["training_flops"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(kept: dict, path: Path) -> None:
    """Accuracy by difficulty, a line a model: the mean over the seeds, and all seeds between the edges of its band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, found in kept["models"].items():
        by_bucket: dict[int, list[float]] = {}
        unit = ""
        for one in found:
            way = one.get("accuracy") or {}
            for bucket in way.get("generated", way.get("exact", {})).get("buckets", []):
                number, unit = (re.search(r"\d+", bucket["name"]), re.sub(r"\d+", "", bucket["name"]).strip())
                by_bucket.setdefault(int(number[0]), []).append(bucket["accuracy"])
        if by_bucket:
            x = sorted(by_bucket)
            axes.plot(x, [statistics.mean(by_bucket[n]) for n in x], label=name, linewidth=1.4)
            axes.fill_between(x, [min(by_bucket[n]) for n in x], [max(by_bucket[n]) for n in x], alpha=0.2)
            axes.set_xlabel(unit)
    axes.set_ylabel("share of problems solved")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def fill(text: str, results: Path) -> str:
    """A page with the tables of the results that are there set in."""

    def block(match: re.Match) -> str:
        path = results / f"{match[1]}.json"
        if not path.exists():
            return match[0]
        kept = json.loads(path.read_text(encoding="utf-8"))
        return f"<!-- results: {match[1]} -->\n{table(kept)}\n\n`{kept['command']}`\n<!-- end -->"

    return MARK.sub(block, text)


def main(names: Sequence[str], runs: Path = HERE.parent / "runs" / "comparisons") -> None:
    names = names or [*sorted(path.stem for path in HERE.glob("*.yaml")), *OTHERS]
    (HERE / "results").mkdir(exist_ok=True)
    for name in names:
        kept = keep(runs, name)
        if kept is not None:
            (HERE / "results" / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(f"\n{name}\n{table(kept)}")
            of_task = any(isinstance(one.get("accuracy"), dict) for found in kept["models"].values() for one in found)
            drawn = runs.parent / name / f"{name}.png"  # what a sweep over budgets draws itself
            if of_task and name not in OTHERS:
                draw(kept, HERE / "results" / f"{name}.png")
            elif drawn.exists():
                shutil.copy(drawn, HERE / "results")
    if PAGE.exists():
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
