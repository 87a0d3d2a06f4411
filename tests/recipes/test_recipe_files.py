"""The files under recipes/: every one is shown, its sizes are the published ones, and a tiny cut of it takes a step."""

import copy
import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from undertow import recipe as recipes
from undertow.analysis import compare
from undertow.analysis.show import plain
from undertow.backbone.known import KNOWN
from undertow.data import collate, train_tokenizer
from undertow.data.corpus import Document
from undertow.recipe import Recipe
from undertow.tasks import TASKS
from undertow.tasks.parse import mapping
from undertow.training import optimisers, run, sweep

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT / "recipes")
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name not in ("sweeps", "trm", "retrofit") and path.stem != "demo"  # tested where they are used
)
PUBLISHED = [file for file in FILES if file.parent.name != "small"]

loaded = functools.cache(lambda file: recipes.load(ROOT / "recipes" / file))


# ---------------------------------------------------------------------- what they say


@pytest.mark.filterwarnings("ignore:.*published sizes")  # no hub in tests
@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_recipe_is_shown(file):
    recipe = loaded(file)
    shown = plain(recipe, width=200)
    assert shown.startswith(recipe.name) and "block evaluations per token" in shown
    for method in (recipe.depth, recipe.time):
        # The memory is in the picture exactly where there is one.
        assert method is None or method.kind == "depth" or "memory" in shown


def test_there_are_at_least_thirty_published_ones_and_the_table_has_them_all():
    table = (ROOT / "docs" / "recipes.md").read_text()
    assert len(PUBLISHED) >= 30
    for file in PUBLISHED:
        row = re.search(rf"^\| `{re.escape(str(file))}` \|.*$", table, re.MULTILINE)
        assert row, f"docs/recipes.md has no row of {file}"
        twin = re.search(r"`small/(\w+)\.yaml` \|$", row[0])
        assert twin and Path("small", f"{twin[1]}.yaml") in FILES, f"{file} has no twin: {row[0]}"
    for named in re.findall(r"`((?:t2mlr|ilr|lrt|gpttrm|small)/\w+\.yaml)`", table):
        assert Path(named) in FILES, f"docs/recipes.md names {named}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_recipe_begins_with_what_it_is(file):
    text = (ROOT / "recipes" / file).read_text()
    assert text.startswith("# ")
    for word in ("# Source: ", "# Expected", "# Hardware: ", "# Differs: ") if file in PUBLISHED else ():
        assert word in text, f"{file} lacks {word}"


def test_sweeps_hold_every_row_of_the_table_and_every_twin():
    table = sweep.load(ROOT / "recipes" / "sweeps" / "ilr_small.yaml")
    assert len(table.runs) == 11 * 4
    small = {f.stem for f in PUBLISHED if str(f).startswith("ilr/small_")}
    assert {one.model for one in table.runs.values()} == {stem for stem in small if not stem.endswith("_recurrent")}
    twins = set(re.findall(r"`small/(\w+)\.yaml` \|$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE))
    assert set(sweep.load(ROOT / "recipes" / "sweeps" / "twins.yaml").runs) == twins


PARAMETERS = {  # counted on the published code, or printed by it
    "ilr/small_baseline.yaml": 1_180_800,
    "ilr/small_4211.yaml": 1_180_800,
    "ilr/small_4211_recurrent.yaml": 1_180_800,  # as published, but for 32,768 that are never read
    "ilr/small_3221_recurrent.yaml": 1_180_800,
    "ilr/large_baseline.yaml": 100_086_528,
    "ilr/large_12111111.yaml": 100_086_528,
    "gpttrm/baseline.yaml": 17_670_656,
    "gpttrm/option_a.yaml": 18_789_377,
    "gpttrm/option_b.yaml": 18_789_377,
}


@pytest.mark.parametrize("file", PARAMETERS)
def test_sizes_are_the_published_ones(file):
    with torch.device("meta"):
        model = run.build_model(loaded(Path(file)))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[file]


def test_learned_positions_add_the_published_table():
    path = ROOT / "recipes" / "ilr" / "small_baseline.yaml"
    with torch.device("meta"):
        model = run.build_model(recipes.load(path, ["backbone.position=learned"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_311_872


def test_a_step_has_the_published_number_of_tokens():
    tokens = {"ilr": 65_536, "lrt": 524_288}
    tokens |= dict.fromkeys(["t2mlr/fineweb_135m.yaml", "t2mlr/fineweb_360m.yaml", "t2mlr/ftp.yaml"], 524_288)
    found = set()
    for file in PUBLISHED:
        wanted = tokens.get(str(file), tokens.get(file.parent.name))
        if wanted is not None:
            recipe = loaded(file)
            assert recipe.training.batch_size * recipe.training.accumulation * recipe.data.seq_len == wanted, file
            found.add(str(file) if str(file) in tokens else file.parent.name)
    assert found == set(tokens)


def test_settings_are_the_published_ones():
    """What scripts and run lists say and a reader would look up first."""
    for file in PUBLISHED:
        recipe = loaded(file)
        if file.parent.name == "lrt":
            assert recipe.training.tokens_per_parameter == (10 if file.stem.startswith("d20_") else 12), file
            assert (recipe.data.tokenizer_characters, recipe.data.vocab_size) == (2_000_000_000, 32768), file
        if file.stem.endswith("multi_refine"):
            refinements = recipe.schedule.K  # the flag's default, and the README's best row
            assert refinements == (2 if file.stem.startswith("d12_") else 3), file
    hotpot = loaded(Path("t2mlr/hotpotqa.yaml")).training
    assert hotpot.batch_size * hotpot.accumulation * 8192 / 1300 == pytest.approx(64, rel=0.02)  # questions a step
    own, listed = (loaded(Path(f"t2mlr/s5_baseline{name}.yaml")) for name in ("_rope", ""))
    assert (own.training.floor, own.data.source.actions, own.data.source.test_actions) == (0, (8, 16), (1, 32))
    assert (listed.training.floor, listed.data.source.actions, listed.data.source.test_actions) == (
        0.01,
        (1, 32),
        (1, 48),
    )


def test_small_data_are_what_make_writes(tmp_path):
    folder = ROOT / "recipes" / "small" / "data"
    spec = importlib.util.spec_from_file_location("make", folder / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.main(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in folder.iterdir() if path.suffix in (".jsonl", ".csv"))
    for name in written:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), f"run {folder / 'make.py'}"
        assert (tmp_path / name).stat().st_size < 100_000


# ---------------------------------------------------------------------- what they do


TINY = {  # of a generated task: few small problems of the same kind
    "S5": {"actions": (1, 3), "validation_actions": None, "test_actions": (1, 4)},
    "VariableAssignment": {"n_base": 2, "distractors": 1},
    "Pathfinding": {"backbone": (3, 3), "lanes": 1, "dead_ends": 0.0},
    "ProsQA": {"hops": (1, 1), "nodes": 4},
}
ROWS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small stand-ins for everything that is read: text, a tokenised data set, and the data in recipes/small."""
    from datasets import Dataset, DatasetDict

    folder, small = tmp_path_factory.mktemp("sources"), ROOT / "recipes" / "small" / "data"
    texts = [f"{number}: " + "the state of the token before, carried on. " * 5 for number in range(30)]
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    Dataset.from_dict({"text": texts}).to_parquet(folder / "pages.parquet")
    tokenizer = train_tokenizer([Document(str(i), text) for i, text in enumerate(texts)], 280, folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    DatasetDict({"train": Dataset.from_dict({"input_ids": ids})}).save_to_disk(folder / "tokenised")
    return {
        "folder": folder,
        "stdlib": str(folder / "text"),
        "FineWeb": {"path": str(folder / "pages.parquet"), "holdout": 5},
        "Tokenised": {"path": str(folder / "tokenised"), "validation": None},
        "GSM8K": {"path": str(small / "gsm8k_train.jsonl"), "test": str(small / "gsm8k_test.jsonl"), "variant": "main"},
        "HotpotQA": {"path": str(small / "hotpotqa_train.jsonl"), "test": str(small / "hotpotqa_test.jsonl")},
        "Topics": {split: str(small / "topics_valid.csv") for split in ("train", "validation", "test")}
        | {"train": str(small / "topics_train.csv")},
    }


def cut(recipe: Recipe, sources) -> Recipe:
    """The recipe in small: the same family, methods, layer numbers, schedule, task and optimiser.

    Width, heads, vocabulary, rows and problems shrink. Layers do where no method counts them one by one: as many as the
    window's two ends are in from the stack's, and two between. Rows are as long as the schedule needs to show itself
    and the shortest problems to fit.
    """
    values = copy.deepcopy(recipe.to_dict())
    backbone = values["backbone"]
    if recipe.backbone.pretrained is not None:
        backbone = {key: value for key, value in KNOWN[recipe.backbone.pretrained].items() if key != "model_type"}
        backbone["family"] = KNOWN[recipe.backbone.pretrained]["model_type"]
    kv = backbone.get("num_key_value_heads", backbone["num_attention_heads"])
    backbone |= {"hidden_size": 32, "num_attention_heads": 2}
    if "num_key_value_heads" in backbone:
        backbone["num_key_value_heads"] = 1 if kv < backbone["num_attention_heads"] else 2
    if "intermediate_size" in backbone:
        backbone["intermediate_size"] = 64
    backbone.pop("vocab_size", None)  # the tokenizer's
    if hasattr(recipe.time, "start"):
        start, end = recipe.time.start, recipe.time.end
        layers = start + 2 + (-end - 1) if end < 0 else backbone["num_hidden_layers"]
        backbone["num_hidden_layers"] = min(backbone["num_hidden_layers"], layers)
    elif recipe.depth is None:
        backbone["num_hidden_layers"] = min(backbone["num_hidden_layers"], 4)
    values["backbone"] = backbone

    data, task = values["data"], values["data"]["source"]
    long = {"Pathfinding": 4, "ProsQA": 2, "GSM8K": 4, "HotpotQA": 4, "VariableAssignment": 2}
    if isinstance(task, dict):
        name = task["task"]
        data["seq_len"] = LENGTH * long.get(name, 1)
        task |= {"train": 24, "validation": 4, "test": 4} | TINY[name] if name in TINY else sources[name]
        data["tokenizer"] = str(sources["folder"] / "tokenizer") if name == "Tokenised" else None
    else:
        data["source"], data["seq_len"] = sources[task], LENGTH
    if type(recipe.schedule).__name__ == "Chunked":
        data["seq_len"] = 2 * recipe.schedule.C
    backbone["max_position_embeddings"] = max(256, data["seq_len"])
    data |= {"vocab_size": 280, "validation_rows": None, "cache_dir": str(sources["folder"] / "cache")}
    values["training"] |= {"batch_size": ROWS, "accumulation": 1, "max_steps": 1, "precision": "float32"}
    limits = [limit for limit in compare.LIMITS.values() if limit != "max_steps"]
    values["training"] = {key: value for key, value in values["training"].items() if key not in limits}
    values["training"] |= {"tensorboard": False, "statistics": False}
    values["evaluation"] |= {"points": 1, "rows": 2, "batch_size": 2, "new_tokens": 2, "records": 2}
    return Recipe.parse(values)


def step(recipe: Recipe) -> dict[str, float]:
    """One step of training, as `undertow train` takes it; how far every trained parameter moved."""
    data = run.open_data(recipe)
    model = run.build_model(recipe, data.tokenizer).train()
    before = {name: parameter.detach().clone() for name, parameter in optimisers.trainable(model)}
    optimiser = optimisers.build(model, recipe.training, ROWS * recipe.data.seq_len)
    loss = model(**collate([data.train[i] for i in range(ROWS)])).loss
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss) and loss > 0
    after = dict(model.named_parameters())
    return {name: float((after[name].detach() - old).abs().max()) for name, old in before.items()}


def _program(file: Path) -> tuple:
    """What tells two recipes apart but for sizes: family, methods, schedule, task, optimiser."""
    values = recipes.read_yaml(ROOT / "recipes" / file)
    backbone = values["backbone"]
    family = backbone.get("family") or KNOWN[backbone["pretrained"]]["model_type"]
    words = [recipes.component(section, values.get(section)) for section in ("depth", "time", "schedule")]
    source = values["data"].get("source", "stdlib")
    task = source if source == "stdlib" else mapping(source)["task"]
    optimiser = values["training"].get("optimiser")
    return family, *(type(word).__name__ for word in words), task, optimiser, "future" in values


def _first_of_each():
    seen: set[tuple] = set()
    for file in FILES:
        program = _program(file)
        yield pytest.param(file, id=str(file), marks=[pytest.mark.slow] if program in seen else [])
        seen.add(program)


@pytest.mark.parametrize("file", _first_of_each())
def test_a_tiny_cut_takes_one_step(file, sources):
    whole = loaded(file)
    small = cut(whole, sources)
    assert _same_program(whole, small)
    moved = step(small)
    # Everything that is trained has a gradient, but for what its own start holds at zero (a closed gate).
    assert sum(distance > 0 for distance in moved.values()) > len(moved) / 2


def _same_program(whole: Recipe, small: Recipe) -> bool:
    """A cut that lost the method, its schedule or its task would prove nothing."""
    kept = (whole.depth, whole.time, whole.schedule, whole.future) == (
        small.depth,
        small.time,
        small.schedule,
        small.future,
    )
    kinds = [type(recipe.data.source) for recipe in (whole, small)]
    return kept and kinds[0] is kinds[1] and whole.training.optimiser == small.training.optimiser


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "small"], ids=str)
def test_a_tiny_cut_of_a_twin_is_trained_and_scored(file, sources, tmp_path):
    recipe = cut(loaded(file), sources)
    result = run.train(recipe, run.folder_for(recipe, tmp_path / "run"), device="cpu")
    assert result["steps"] == 1 and result["bits_true"] > 0
    task = recipe.data.source
    assert ("accuracy" in result) == (type(task) in TASKS.values() and task.kind in ("answers", "tags"))
