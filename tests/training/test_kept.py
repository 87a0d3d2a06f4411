"""What a run keeps of its data: measured or gone on with later, from elsewhere, or on files that have changed."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from training_runs import Kill, trained

from commands import call
from undertow import recipe as recipes
from undertow.analysis import compare
from undertow.data import fingerprint
from undertow.data.corpus import Document
from undertow.data.format import SAVED
from undertow.recipe import Recipe, RecipeError
from undertow.tasks import TASKS
from undertow.training import kept, run


def made(values, **training):
    """A recipe whose paths are relative to the working folder."""
    data = values["data"] | {"source": "texts", "cache_dir": "cache"}
    return Recipe.parse(values | {"data": data, "training": values["training"] | {"max_steps": 3} | training})


@pytest.fixture(scope="module")
def once(tmp_path_factory, corpus, values):
    """A folder with `texts` and a run on them in `run`."""
    place = tmp_path_factory.mktemp("once")
    (place / "texts").mkdir()
    for name in ("ast", "bisect", "queue", "sched", "uuid"):
        shutil.copy(corpus / f"{name}.txt", place / "texts")
    with contextlib.chdir(place):
        trained(made(values), place / "run")
    return place


@pytest.fixture
def texts(once, tmp_path, monkeypatch):
    """A working folder with texts in it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(once / "texts", tmp_path / "texts"))


@pytest.fixture
def finished(once, texts):
    """A run on the texts in `run`, and its result."""
    folder = Path(shutil.copytree(once / "run", texts.parent / "run"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(once), str(texts.parent)))
    return folder, json.loads((folder / "result.json").read_text())


def evaluated(capsys, folder, *options):
    """(exit status, stderr, true bits per byte or None)."""
    status, _, err = call(capsys, "eval", folder, "--device", "cpu", *options)
    return status, err, None if status else json.loads((folder / "evaluation.json").read_text())["bits_true"]


def test_a_run_evaluates_the_same_from_any_folder(finished, capsys, monkeypatch, tmp_path):
    folder, result = finished
    source = yaml.safe_load((folder / "recipe.yaml").read_text())["data"]
    assert source["source"] == str(tmp_path / "texts") and source["cache_dir"] == str(tmp_path / "cache")
    (tmp_path / "other" / "texts").mkdir(parents=True)  # not these
    (tmp_path / "other" / "texts" / "a.txt").write_text("other words\n" * 50)
    monkeypatch.chdir(tmp_path / "other")
    assert evaluated(capsys, folder)[2] == pytest.approx(result["bits_true"], rel=1e-9)
    status, _, err = call(capsys, "check", folder, "--device", "cpu")
    assert status == 0, err


def test_changed_texts_are_refused_and_named_or_taken_as_they_are(finished, capsys):
    folder, result = finished
    texts = folder.parent / "texts"
    (texts / "wholly_new.txt").write_text("Something else altogether, 12345.\n" * 400)
    for verb in ("eval", "check", "report"):
        if verb == "report":
            (folder / "lens.json").unlink(missing_ok=True)
        status, _, err = call(capsys, verb, folder, "--device", "cpu")
        assert status == 2 and err.count("\n") == 1, err
        assert "texts are not those of the run: train (new: texts/wholly_new.txt)" in err
        assert "--accept-changed-data goes on" in err
    with pytest.warns(UserWarning, match="texts are not those of the run"):
        status, _, bits = evaluated(capsys, folder, "--accept-changed-data")
    assert bits == pytest.approx(result["bits_true"], rel=1e-9), "its own tokenizer, hence the same score"
    (texts / "wholly_new.txt").unlink()
    held = next(path for path in texts.iterdir() if path.name in _validation(folder))
    held.write_text(held.read_text() + "\nmore\n")
    status, err, _ = evaluated(capsys, folder)
    assert status == 2 and f"validation (changed: texts/{held.name})" in err


def _validation(folder):
    names = json.loads((folder / kept.DATA).read_text())["texts"]["validation"]["names"]
    return [name.partition("/")[2] for name in names]


def test_a_run_whose_texts_are_gone_still_writes(finished, capsys):
    folder, _ = finished
    shutil.rmtree(folder.parent / "texts")
    status, err, _ = evaluated(capsys, folder)
    assert status == 2 and err.count("\n") == 1 and "no such file or folder" in err
    status, out, err = call(capsys, "generate", folder, "def ", "--max-new-tokens", 4, "--device", "cpu")
    assert status == 0 and out.startswith("def "), err


def test_a_run_on_records_that_are_gone_still_writes(finished, capsys):
    """Its recipe says what holds for a task, which the records' folder no longer tells."""
    folder, _ = finished
    held = yaml.safe_load((folder / "recipe.yaml").read_text())
    held["data"] |= {"source": str(folder / "gone"), "memory": "response", "loss": "all"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(held))
    status, out, err = call(capsys, "generate", folder, "def ", "--max-new-tokens", 4, "--device", "cpu")
    assert status == 0 and out.startswith("def "), err


def test_a_run_goes_on_with_its_own_texts_and_tokenizer(texts, values, capsys):
    folder, recipe = texts.parent / "run", made(values, max_steps=4, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, folder, callbacks=[Kill(3)])
    first = (folder / "checkpoints" / "checkpoint-2" / "tokenizer.json").read_text()
    (texts / "wholly_new.txt").write_text("Something else altogether, 12345.\n" * 400)
    status, _, err = call(capsys, "train", folder, "--resume", "--device", "cpu")
    assert status == 2 and "train (new: texts/wholly_new.txt)" in err and not (folder / "result.json").exists()
    with pytest.warns(UserWarning, match="texts are not those of the run"):
        status, _, err = call(capsys, "train", folder, "--resume", "--accept-changed-data", "--device", "cpu")
    assert status == 0, err
    assert json.loads((folder / "model" / "tokenizer.json").read_text())["model"] == json.loads(first)["model"]
    status, _, err = call(capsys, "train", folder, "--accept-changed-data", "--device", "cpu", "--out", "new")
    assert status == 2 and "--accept-changed-data: only with --resume" in err


def test_a_comparison_goes_on_with_the_texts_of_its_runs(finished):
    """Whether the first model has begun or another one."""
    folder, _ = finished
    recipe, texts = recipes.load(folder), folder.parent / "texts"
    both = folder.parent / "both"
    shutil.copytree(folder, both / "second")
    tokenizer = compare._data(recipe, both, False).tokenizer
    (texts / "wholly_new.txt").write_text("Something else altogether, 12345.\n" * 400)
    with pytest.raises(RecipeError, match="new: texts/wholly_new.txt"):
        compare._data(recipe, both, False)
    with pytest.warns(UserWarning, match="new: texts/wholly_new.txt"):
        assert compare._data(recipe, both, True).tokenizer.get_vocab() == tokenizer.get_vocab()
    assert compare._data(recipe, None, False).tokenizer.get_vocab() != tokenizer.get_vocab()  # a new comparison


@pytest.mark.slow
def test_a_comparison_is_refused_other_texts(texts, values, capsys):
    shared = made(values).to_dict()
    models = [{"name": "one", "time": None}, {"name": "two", "time": "T2MLR(0, 1)"}]
    plan = {"data": shared["data"], "backbone": shared["backbone"], "models": models, "budget": {"steps": 2}}
    plan |= {"training": values["training"] | {"max_steps": None}, "evaluation": values["evaluation"]}
    (texts.parent / "plan.yaml").write_text(yaml.safe_dump(plan))
    out = ("--out", texts.parent / "both", "--device", "cpu")
    assert call(capsys, "compare", texts.parent / "plan.yaml", *out)[0] == 0
    (texts / "wholly_new.txt").write_text("Something else altogether, 12345.\n" * 400)
    shutil.rmtree(texts.parent / "both" / "two")
    status, _, err = call(capsys, "compare", texts.parent / "plan.yaml", "--resume", *out)
    assert status == 2 and "train (new: texts/wholly_new.txt)" in err
    assert not (texts.parent / "both" / "two").exists()
    saved = recipes.read_yaml(texts.parent / "both" / "comparison.yaml")["models"]
    assert {one["data"]["source"] for one in saved} == {str(texts)}


def test_the_runs_of_a_sweep_have_the_same_texts(finished):
    """One that begins after the files have changed is refused; a run beside others, outside a sweep, is not."""
    folder, _ = finished
    recipe, runs = recipes.load(folder), folder.parent / "sweep" / "runs"
    shutil.copytree(folder, runs / "first")
    (folder.parent / "texts" / "wholly_new.txt").write_text("Something else altogether, 12345.\n" * 400)
    (runs / "second").mkdir()
    assert kept.opened(runs / "second", recipe, False, None, False).texts["train"]["count"] == 5
    (runs.parent / "sweep.json").write_text("{}")
    with pytest.raises(RecipeError, match="first: the texts are not those of the run: train"):
        kept.opened(runs / "third", recipe, False, None, False)


def test_runs_written_before_formats_were_kept(finished, capsys, recwarn):
    """What is assumed of them is said."""
    folder, result = finished
    config = folder / "model" / "tokenizer_config.json"
    held = json.loads(config.read_text())
    assert held.pop(SAVED)["bos"] is True
    config.write_text(json.dumps(held))
    (folder / kept.DATA).unlink()
    assert evaluated(capsys, folder)[2] == pytest.approx(result["bits_true"], rel=1e-9)
    said = {str(warning.message) for warning in recwarn.list}
    assert any("written before it was kept how texts are read: assuming a bos (yes)" in line for line in said)
    assert any("has no data.json: whether the texts are those of the run is not known" in line for line in said)


def test_every_path_becomes_absolute(texts, values):
    """Of texts, tasks, tokenizers and weights; hub ids, and what is no path, stay."""
    (texts.parent / "questions.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}\n')
    (texts.parent / "main").mkdir()  # the name of an option of the task
    here = str(texts.parent)

    def of(**data):
        return kept.absolute(Recipe.parse(values | {"data": {"seq_len": 32} | data})).data

    assert of(source="texts/*.txt").source == f"{here}/texts/*.txt"
    assert of(source=["texts/ast.txt", "stdlib"]).source == (f"{here}/texts/ast.txt", "stdlib")
    assert of(source="texts", validation="texts/uuid.txt").validation == f"{here}/texts/uuid.txt"
    assert of(source="texts", tokenizer="texts").tokenizer == f"{here}/texts"
    task = of(source={"task": "GSM8K", "path": "questions.jsonl"}).source
    assert task == TASKS["GSM8K"](path=f"{here}/questions.jsonl")
    assert of(source="stdlib", tokenizer="some/model").tokenizer == "some/model"


def test_what_differs_between_two_fingerprints():
    a, b = Document("d/a", "one"), Document("d/b", "two")
    then = {"train": fingerprint.of_documents([a, b])}
    assert fingerprint.difference(then, {"train": fingerprint.of_documents([a, b])}) is None
    changed = [a, Document("d/b", "three"), *(Document(f"d/{i}", str(i)) for i in range(5))]
    said = fingerprint.difference(then, {"train": fingerprint.of_documents(changed[1:])})
    assert said == "train (new: d/0, d/1, d/2 and 2 more; gone: d/a; changed: d/b)"
    then, now = ({"test": fingerprint.of_records(parts)} for parts in (["1", "2"], ["2", "1"]))
    assert "other contents or another order" in fingerprint.difference(then, now)
    assert fingerprint.difference(then, {"test": fingerprint.of_records(["1"])}) == "test (2 texts then, 1 now)"
    assert fingerprint.difference(then, {}) == "test (is not there)"


def test_a_torn_note_is_one_line(finished):
    folder, _ = finished
    (folder / kept.DATA).write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"{kept.DATA}: torn")):
        kept.reopen(folder, recipes.load(folder))
    with pytest.raises(RecipeError, match="cannot resume"):
        run.folder_for(made({**recipes.load(folder).to_dict()}, learning_rate=1.0), folder, resume=True)
