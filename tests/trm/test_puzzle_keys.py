"""Every key of a recipe of puzzles is read: another value changes what runs, or is refused as not applying."""

import hashlib
import json

import pytest
import tiny_run as tiny
from safetensors.torch import load_file

from undertow.recipe import RecipeError
from undertow.trm import model as trm_model
from undertow.trm import run, show, solving
from undertow.trm.config import Network
from undertow.trm.puzzles import ARC, Maze, Sudoku, load
from undertow.trm.recipe import PuzzleEvaluation, PuzzleRecipe
from undertow.trm.settings import TRMTraining

BASE = {
    "name": "keys",
    "puzzle": tiny.SUDOKU,
    "network": {
        "width": 8,
        "heads": 2,
        "inner": 2,
        "outer": 2,
        "layers": 1,
        "prefix": 2,
        "max_steps": 3,
        "round_to": 8,
    },
    "training": {
        "steps": 4, "batch_size": 4, "warmup": 1, "learning_rate": 0.03, "puzzle_learning_rate": 0.1, "ema": 0.5,
        "precision": "float32", "log_every": 2, "save_every": 2, "evaluate_every": 3,
    },
    "evaluation": {"puzzles": 4, "batch_size": 4, "sure": [0.9]},
}  # fmt: skip
OTHER = {  # of every key, some other value
    "name": "other",
    "seed": 1,
    "puzzle": tiny.SUDOKU | {"seed": 1},
    "network": {
        "variant": "singlez", "mixing": "mlp", "positions": "learned", "width": 16, "heads": 1, "expansion": 9.0,
        "layers": 2, "inner": 3, "outer": 1, "puzzle_width": 4, "prefix": 3, "max_steps": 2, "continue_loss": True,
        "round_to": 64,
    },
    "training": {
        "steps": 5, "batch_size": 2, "loss": "softmax", "optimiser": "adamw", "learning_rate": 0.01,
        "betas": [0.5, 0.95], "weight_decay": 0.0, "warmup": 4, "floor": 0.0, "clip": 0.01,
        "puzzle_learning_rate": 0.5, "puzzle_decay": 9.0, "exploration": 1.0, "ema": None, "precision": "bfloat16",
        "evaluate_every": 2, "log_every": 3, "save_every": 1, "keep": 1,
    },
    "evaluation": {"puzzles": 3, "batch_size": 3, "precision": "bfloat16", "sure": [0.2]},
}  # fmt: skip
TOGETHER = {("network", "mixing"): {"positions": "none", "heads": 8}}  # what else must change, for it to be allowed
KEYS = [(s, k) for s, keys in OTHER.items() for k in (keys if s in ("network", "training", "evaluation") else [None])]


def with_other(section, key) -> dict:
    if key is None:
        return BASE | {section: OTHER[section]}
    return BASE | {section: BASE[section] | TOGETHER.get((section, key), {}) | {key: OTHER[section][key]}}


@pytest.fixture(scope="module")
def happened(tmp_path_factory):
    """`happened(values)`: all that a run leaves behind or hands to the model when it is measured, seconds aside."""
    root = tmp_path_factory.mktemp("keys")

    def told(values: dict) -> dict:
        folder = root / hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
        folder.mkdir()
        asked = []

        def answers(model, inputs, *arguments, **options):
            asked.append((len(inputs), options["precision"]))
            return honest(model, inputs, *arguments, **options)

        honest = solving.answers
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UNDERTOW_CACHE", str(root / "cache"))
            patch.setattr(trm_model, "Q_BIAS", 1.0)  # rows want to halt at once, so that exploring shows
            patch.setattr(solving, "answers", answers)
            patch.setattr(show, "cost", lambda model: show.Cost(0, 0, 0.0, 0.0))  # slow, and read off the network
            result = run.train(PuzzleRecipe.parse(values), folder, device="cpu")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        weights = {name: x.tolist() for name, x in load_file(folder / "model" / "model.safetensors").items()}
        return {
            "result": {k: v for k, v in result.items() if k not in ("seconds", "puzzles_per_second", "seed")},
            "metrics": [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines],
            "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
            "weights": weights,
            "asked": asked,
        }

    return told


@pytest.fixture(scope="module")
def before(happened):
    return happened(BASE)


def test_all_keys_are_here():
    held = {"network": Network, "training": TRMTraining, "evaluation": PuzzleEvaluation}
    assert OTHER.keys() == PuzzleRecipe.model_fields.keys()
    assert {s: set(OTHER[s]) for s in held} == {s: set(cls.model_fields) for s, cls in held.items()}


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda part: str(part))
def test_another_value_changes_what_runs(section, key, happened, before):
    values = with_other(section, key)
    after = happened(values)
    if extra := TOGETHER.get((section, key)):
        before = happened(BASE | {section: BASE[section] | {k: v for k, v in extra.items() if k != "heads"}})
    assert after != before
    if (section, key) == ("training", "exploration"):
        assert after["weights"] != before["weights"]


def test_the_same_values_change_nothing(happened, before):
    again = happened(dict(reversed(list(BASE.items()))))
    assert again == before


REFUSED = {
    "network.inner": ({"network": {"variant": "transformer", "inner": 3}}, "3: does not apply to variant: transformer"),
    "network.outer": ({"network": {"variant": "transformer", "outer": 2}}, "2: does not apply to variant: transformer"),
    "network.heads": (
        {"network": {"mixing": "mlp", "positions": "none", "heads": 4}}, "4: does not apply to mixing: mlp",
    ),
    "network.prefix": ({"network": {"puzzle_width": 0, "prefix": 4}}, "4: does not apply to puzzle_width: 0"),
    "training.puzzle_learning_rate": (
        {"network": {"puzzle_width": 0}, "training": {"puzzle_learning_rate": 0.1}},
        "0.1: does not apply to puzzle_width: 0",
    ),
    "training.puzzle_decay": (
        {"network": {"puzzle_width": 0}, "training": {"puzzle_decay": 0.1}}, "0.1: does not apply to puzzle_width: 0",
    ),
    "training.exploration": (
        {"network": {"max_steps": 1}, "training": {"exploration": 0.5}}, "0.5: does not apply to max_steps: 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_nothing_would_read_is_refused(key):
    values, said = REFUSED[key]
    with pytest.raises(RecipeError) as error:
        PuzzleRecipe.parse({"puzzle": "Sudoku"} | values)
    assert str(error.value) == f"{key}: {said}; leave it out"
    section, name = key.split(".")
    del values[section][name]
    kept = PuzzleRecipe.parse({"puzzle": "Sudoku"} | values)
    assert PuzzleRecipe.parse(kept.to_dict()) == kept  # defaults written out are no one's wish


def test_runs_of_before_are_read():
    """Their recipes write every default out, the prefix of 16 tokens too."""
    for variant in ("trm", "transformer"):
        plain = PuzzleRecipe.parse({"puzzle": "Sudoku", "network": {"variant": variant, "puzzle_width": 0}}).to_dict()
        plain["network"]["prefix"] = 16
        assert PuzzleRecipe.parse(plain).network.prefixed == 0


SOURCES = [  # of every option of every source, some other value
    (Sudoku, tiny.SUDOKU, {"size": 6, "train": 11, "test": 5, "augmentations": 1, "clues": 9, "rating": 4, "seed": 1}),
    (Maze, {"size": 5, "train": 4, "test": 3, "augmentations": 2, "loops": 0.5},
     {"size": 6, "train": 5, "test": 2, "augmentations": 1, "loops": 0.0, "length": 3, "seed": 1}),
    (ARC, {"test": "e", "augmentations": 2}, {"test": "t", "train": "t", "augmentations": 1, "seed": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "base", "other"), SOURCES, ids=["Sudoku", "Maze", "ARC"])
def test_every_option_of_a_source_changes_its_puzzles(cls, base, other, tmp_path):
    grid = [[1, 2], [3, 4]]
    for place, count in (("e", 2), ("t", 3)):
        pairs = [{"input": grid, "output": [[i]]} for i in range(count)]
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{place}.json").write_text(json.dumps({"train": pairs, "test": pairs[:1]}))

    def made(options) -> list:
        options = {
            k: str(tmp_path / v) if cls is ARC and isinstance(v, str) else tuple(v) if isinstance(v, list) else v
            for k, v in options.items() if k != "puzzle"
        }  # fmt: skip
        data = load(cls(**options), tmp_path / "cache")
        return [(s.inputs_ES.tolist(), s.labels_ES.tolist(), s.names) for s in data]

    assert set(other) == set(cls.__dataclass_fields__) - {"path"}
    first = made(base)
    for key, value in other.items():
        changed = base | {key: value}
        if key == "rating":  # there are few hard ones of this size
            changed |= {"size": 9, "clues": None, "train": 2, "test": 1}
            first_hard = made(changed | {"rating": 0})
            assert made(changed) != first_hard, key
            continue
        if key == "size" and cls is Sudoku:
            changed["clues"] = [20, 30]
        assert made(changed) != first, key
