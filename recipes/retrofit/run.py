"""A pretrained model made recurrent, from nothing to one table:

    python recipes/retrofit/run.py [--out runs/retrofit] [--set budget.steps=32] [--resume]

Fetches SmolLM2-135M-Instruct (`fetch.py`), measures it as it comes, runs `retrofit.yaml`, and writes
`retrofit.md`: of every row the trained parameters, steps and training FLOPs, the share of the test problems solved (by
generation) and bits per byte of the standard library's documentation, which tells what fine-tuning forgot.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from fetch import fetch
from undertow.analysis import compare
from undertow.analysis.columns import number, table
from undertow.training import run
from undertow.training.progress import progress
from undertow.training.result import Loaded, measure
from undertow_cli.console import out, quiet

FILE = Path(__file__).with_name("retrofit.yaml")
FETCHED = "runs/smollm2"
COLUMNS = (
    ("trained", number("trained_parameters", "{:,.0f}".format)),
    ("steps", number("steps", "{:,.0f}".format)),
    ("training FLOPs", number("training_flops", "{:.2e}".format)),
    ("problems solved", number("solved", "{:.3f}".format)),
    ("bits/byte of prose", number("bits_text", "{:.4f}".format)),
)


def untrained(plan: compare.Comparison, folder: Path) -> dict:
    """What the pretrained model measures as it comes; kept in `pretrained.json`."""
    path = folder / "pretrained.json"
    if not path.exists():
        recipe = plan.recipes["plain"]
        data = run.open_data(recipe)
        model = run.build_model(recipe, data.tokenizer).eval()
        run.write_json(path, measure(Loaded(model, data.tokenizer, recipe), data))
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--out", type=Path, default=Path("runs/retrofit"))
    given.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    given.add_argument("--resume", action="store_true")
    asked = given.parse_args()
    quiet()
    plan = compare.load([FILE], asked.overrides)
    if plan.recipes["plain"].backbone.pretrained == FETCHED:  # else what --set backbone.pretrained names
        fetch(Path(FETCHED))
    folder = run.pick_folder("retrofit", asked.out, asked.resume)
    results = {"as it comes": [untrained(plan, folder)]}
    with progress(out) as bars:
        results |= compare.run(plan, folder, asked.resume, "cpu", bars)
    for place in folder.glob("*/checkpoints"):
        shutil.rmtree(place)  # optimiser states of finished runs: three times the model
    head = ["model", *(title for title, _ in COLUMNS)]
    rows = [[name, *(cell(found) for _, cell in COLUMNS)] for name, found in results.items()]
    lines = [head, ["---", *["---:"] * len(COLUMNS)], *rows]
    (folder / "retrofit.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    out.print(table(results, COLUMNS))


if __name__ == "__main__":
    main()
