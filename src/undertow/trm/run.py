"""One run on puzzles: the folder and the functions of `undertow.training.run`, for recipes of `undertow.trm.recipe`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from undertow import recipe as recipes
from undertow.recipe import RecipeError
from undertow.training.callbacks import read_metrics
from undertow.training.checkpoints import newest_complete
from undertow.training.precision import device_of
from undertow.training.run import parallel, write_json
from undertow.trm import checkpoints, puzzles, show, solving, training
from undertow.trm.config import TRMConfig
from undertow.trm.model import TRM
from undertow.trm.puzzles import PuzzleData, Splits, voting
from undertow.trm.recipe import PuzzleEvaluation, PuzzleRecipe, title


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready to use."""

    model: TRM
    recipe: PuzzleRecipe


def open_data(recipe: PuzzleRecipe) -> Splits:
    """The puzzles of a recipe, made if need be. Raises ValueError or OSError, one line: what is wrong with them."""
    with parallel().main_process_first():
        return puzzles.load(recipe.puzzle)


def train(
    recipe: PuzzleRecipe,
    folder: Path,
    resume: bool = False,
    device: str = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    data: Splits | None = None,
) -> dict:
    """Train the model of a recipe in `folder` and measure it; arguments and errors as of `training.run.train`.

    Returns:
        What `result.json` holds: `cost`, what `solving.evaluate` says of the test split, `seconds` of training with the
        measurements in it, and `puzzles_per_second`, each taken through one supervision step.
    """
    finished = folder / "result.json"
    if resume and finished.exists():
        return json.loads(finished.read_text(encoding="utf-8"))
    data = open_data(recipe) if data is None else data
    settings, found = recipe.training, {}
    config = config_of(recipe, data.train)
    state = TrainerState(max_steps=settings.steps)

    def quality(model: TRM) -> dict:
        found.update(measure(model, data.test, recipe.evaluation))
        return {name: found[name] for name in ("exact_accuracy", "accuracy") if found[name] is not None}

    def tell(event: str, **more: Any) -> None:
        for callback in callbacks:
            getattr(callback, event)(None, state, None, **more)

    def watch(line: dict) -> None:
        state.global_step = line["step"]
        tell("on_step_end")
        tell("on_log", logs=line)

    tell("on_train_begin")
    model = training.train(config, settings, data.train, folder, recipe.seed, resume, device, quality, watch)
    tell("on_train_end")
    if checkpoints.rank() == 0:
        result = cost(recipe) | (found or measure(model, data.test, recipe.evaluation))
        write_json(finished, kept(folder, result) | speed(folder, settings.batch_size))
    checkpoints.wait()
    return json.loads(finished.read_text(encoding="utf-8"))


def config_of(recipe: PuzzleRecipe, data: PuzzleData) -> TRMConfig:
    """The network of a recipe, for these puzzles."""
    sizes = {name: getattr(data, name) for name in ("vocab_size", "seq_len", "num_identifiers")}
    return TRMConfig(**recipe.network.model_dump(), **sizes)


def cost(recipe: PuzzleRecipe) -> dict:
    """What a run will be and cost, nothing trained and no data opened; `tokens` are cells."""
    model, settings = show.on_meta(recipe), recipe.training
    rows = settings.steps * settings.batch_size
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "puzzle": title(recipe.puzzle),
        "variant": recipe.network.variant,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": settings.steps,
        "tokens": rows * model.config.seq_len,
        "training_flops": rows * show.cost(model).training,
    }


def measure(model: TRM, test: PuzzleData, settings: PuzzleEvaluation) -> dict:
    """Accuracy on the first puzzles of the test split, as `solving.evaluate` says it; None where no answer is known.

    Of ARC, where all of it is measured, `passes` too: by k, how often one of the k answers with most votes is right;
    and `attempts`, the two with most votes.
    """
    count = settings.puzzles
    rows = test
    if count is not None and count < len(test):
        rows = dataclasses.replace(test, inputs_ES=test.inputs_ES[:count], labels_ES=test.labels_ES[:count])
    if rows.labelled:
        found = solving.evaluate(model, rows.in_order(settings.batch_size), settings.precision, settings.sure)
        del found["steps"]  # of a result, those of training
    else:
        found = {"puzzles": 0, "exact_accuracy": None, "accuracy": None}
    if voting.votable(test) and len(rows) == len(test):
        score = votes(model, test, settings)
        passes = {str(k): right for k, right in score.passes.items()}
        found |= {"attempts": voting.submission(score)} | ({"passes": passes} if passes else {})
    return found


def votes(model: TRM, test: PuzzleData, settings: PuzzleEvaluation) -> voting.Score:
    """The votes of all forms of every puzzle of a test split of ARC."""
    cast = []
    for batch in test.in_order(settings.batch_size):
        ids, inputs = batch["puzzle_identifiers"], batch["inputs"]
        *_, last = solving.answers(model, inputs, ids, precision=settings.precision)
        said = (x.cpu().numpy() for x in (inputs, ids, last.tokens_BL, last.margin_B.float()))
        cast += voting.votes(test, *said)
    return voting.score(test, cast)


def kept(folder: Path, result: dict) -> dict:
    """The result without its attempts, which become a file of their own, as Kaggle takes it."""
    if "attempts" in result:
        write_json(folder / "attempts.json", result["attempts"])
    return {name: value for name, value in result.items() if name != "attempts"}


def speed(folder: Path, batch_size: int) -> dict[str, float]:
    """How long training took, whatever interrupted it."""
    logged = [line for line in read_metrics(folder / "metrics.jsonl") if "seconds_per_step" in line]
    steps = [line["step"] for line in logged]
    spans = [b - a for a, b in itertools.pairwise([0, *steps])]
    seconds = sum(line["seconds_per_step"] * span for line, span in zip(logged, spans, strict=True))
    return {"seconds": seconds, "puzzles_per_second": batch_size * steps[-1] / seconds}


def load(folder: Path, device: str = "auto", overrides: Sequence[str] = ()) -> Loaded:
    """The model of a run in `eval()`, and its recipe.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: its weights are torn, or it is a run on text.
    """
    folder = Path(folder)
    recipe = recipes.load_any(folder, overrides)
    if not isinstance(recipe, PuzzleRecipe):
        raise RecipeError(f"{folder}: is a run on text; this needs one on puzzles")
    newest = newest_complete(folder / "checkpoints")
    places = [folder / "model", *([] if newest is None else [newest / "model"])]
    found = next((place for place in places if (place / "config.json").exists()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: holds no trained model (no model/, no complete checkpoint)")
    return Loaded(TRM.load(found).to(device_of(device)), recipe)


def evaluate(folder: Path, overrides: Sequence[str] = (), device: str = "auto") -> dict:
    """Measure a trained run again; written to `evaluation.json` in its folder.

    Args:
        overrides: `evaluation.key=value` texts; other sections may not change.
    """
    for text in overrides:
        if not text.startswith("evaluation."):
            raise RecipeError(f"--set {text}: only evaluation.* may change when a run is evaluated")
    loaded = load(folder, device, overrides)
    finished = folder / "result.json"
    before = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else cost(loaded.recipe)
    found = measure(loaded.model, open_data(loaded.recipe).test, loaded.recipe.evaluation)
    result = before | kept(folder, found)
    write_json(folder / "evaluation.json", result)
    return result
