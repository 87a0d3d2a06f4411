"""`undertow eval` on a run whose data is a task, and what of it is only measured when asked for."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from commands import call
from rounding import alike
from sums import Sums, Tagged, tokenizer
from undertow.data import Document, Rows
from undertow.data.format import TextFormat
from undertow.data.packing import pack, tokenise
from undertow.evaluation import accuracy, incontext
from undertow.recipe import Evaluation, Recipe, RecipeError
from undertow.tasks import Example
from undertow.training import kept, run

VALUES = {
    "name": "tiny",
    "backbone": {
        "family": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
    },
    "time": "T2MLR(0, 1)",
    "data": {"source": {"task": "ProsQA"}, "seq_len": 32},  # stands for the tasks below
    "training": {"max_steps": 2, "batch_size": 4, "precision": "float32", "tensorboard": False},
    "evaluation": {"points": 0, "new_tokens": 4, "records": 5},
}  # fmt: skip


@dataclass(frozen=True)
class Lines(Sums):
    kind = "text"
    validation: int = 12

    def draw(self, rng, split):
        return {"text": " ".join(str(rng.randrange(1000)) for _ in range(20))}


def data_of(task):
    """What `open_data` returns for a task, with rows of plain sums whatever the task."""
    texts = [Sums().example(record) for record in Sums(train=200).records("train")]
    parts = [Document(str(i), example.prompt + example.response) for i, example in enumerate(texts)]
    rows = Rows(pack(*tokenise(parts, tokenizer()), 32, 42))
    size = torch.tensor([1] * 41 + [0, 0])
    form = TextFormat(tokenizer(), memory="all" if task is None else "response").carried()
    return SimpleNamespace(
        train=rows, validation=rows.head(4), tokenizer=form.tokenizer, token_bytes=size, task=task,
        format=form, texts={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on sums, trained for two steps."""
    place = tmp_path_factory.mktemp("run")
    recipe = Recipe.parse(VALUES)
    run.train(recipe, run.folder_for(recipe, place / "tiny"), device="cpu", data=data_of(Sums()))
    return place / "tiny"


@pytest.fixture
def evaluated(capsys, monkeypatch, folder):
    """`evaluated(task, *options)` -> (stdout, what is in evaluation.json); or, if it fails, (stderr, None)."""

    def go(task, *options):
        monkeypatch.setattr(kept, "open_data", lambda recipe, form: data_of(task))
        status, out, err = call(capsys, "eval", folder, "--device", "cpu", *options)
        assert status in (0, 2)
        return (err, None) if status else (out, json.loads((folder / "evaluation.json").read_text()))

    return go


def measured_alone(folder, task, way, **keywords):
    model = run.load(folder, "cpu").model
    records = list(task.records(keywords.pop("split", "test")))[: keywords.pop("records", 5)]
    return json.loads(
        json.dumps(way(model, task, TextFormat(tokenizer(), memory="response"), records, **keywords).to_dict())
    )


def test_a_run_on_a_task_ends_with_its_accuracy(folder):
    result = json.loads((folder / "result.json").read_text())["accuracy"]
    assert set(result) == {"split", "exact", "generated"} and result["split"] == "test"
    for way in (accuracy.exact, accuracy.generated):
        assert alike(result[way.__name__], measured_alone(folder, Sums(), way))
    assert result["exact"]["records"] == 5 and len(result["generated"]["shown"]) == 2


def test_accuracy_options(evaluated, folder):
    out, result = evaluated(Sums(), "--split", "validation", "--records", 4, "--samples", 3, "--pass-at", "1,2")
    assert "on validation" in out and "pass@2" in out and "generated" in out
    keywords = {"split": "validation", "records": 4}
    alone = measured_alone(folder, Sums(), accuracy.generated, samples=3, pass_at=(1, 2), **keywords)
    assert alike(result["accuracy"]["generated"], alone) and alone["records"] == 4
    assert alike(result["accuracy"]["exact"], measured_alone(folder, Sums(), accuracy.exact, **keywords))

    _, result = evaluated(Tagged(), "--samples", 2)
    assert set(result["accuracy"]) == {"split", "exact"}  # tags are not written
    assert alike(result["accuracy"]["exact"], measured_alone(folder, Tagged(), accuracy.exact))


def test_no_task_no_accuracy(evaluated, folder):
    """Nothing is measured; what `result.json` holds is kept, as everything else in it."""
    out, result = evaluated(Sums(), "--no-accuracy")
    assert "on test" not in out and result["accuracy"] == json.loads((folder / "result.json").read_text())["accuracy"]
    (folder / "result.json").rename(folder / "kept.json")
    try:
        out, result = evaluated(None)
        assert "accuracy" not in result and "on test" not in out and "bits_true" in result
    finally:
        (folder / "kept.json").rename(folder / "result.json")


def test_shots_lengths_and_loss_by_position(evaluated, folder):
    out, result = evaluated(Sums(), "--shots", "0,2", "--records", 3)
    assert "shots" in out and [one["shots"] for one in result["shots"]] == [0, 2]
    model, records = run.load(folder, "cpu").model, list(Sums().records("test"))[:3]
    alone = incontext.few_shot(model, Sums(), TextFormat(tokenizer(), memory="response"), records, (0, 2))
    assert alike(result["shots"], json.loads(json.dumps([one.to_dict() for one in alone])))

    out, result = evaluated(Lines(), "--lengths", "16, 64", "--icl", "--records", 9)
    assert all(word in out for word in ("context", "perplexity", "early - late"))
    assert [one["length"] for one in result["lengths"]] == [16, 64]
    assert all(one["perplexity"] > 1 and one["bits_per_byte"] > 0 for one in result["lengths"])
    assert (result["icl"]["length"], result["icl"]["documents"]) == (32, 9)

    out, result = evaluated(Lines(), "--context-lengths", "4, 16", "--records", 9)
    assert "first tokens" in out and [one["length"] for one in result["context_lengths"]] == [4, 16]
    assert [one["texts"] for one in result["context_lengths"]] == [9, 9] and result["context_lengths"][0][
        "tokens"
    ] == 27


@pytest.mark.parametrize(
    ("task", "options", "line"),
    [
        (None, ["--accuracy"], "evaluation.accuracy: data.source is plain text"),
        (Lines(), ["--accuracy"], "data.source is Lines, a task of kind 'text'"),
        (None, ["--shots", "1"], "--shots: data.source must be a task with answers"),
        (Tagged(), ["--shots", "1"], "--shots: data.source must be a task with answers"),
        (Sums(), ["--shots", "1,x"], "--shots '1,x': must be whole numbers of at least 0"),
        (Sums(), ["--lengths", "1"], "--lengths '1': must be whole numbers of at least 2"),
        (Sums(), ["--pass-at", "2"], "evaluation.pass_at: 2: exceeds samples, 1"),
        (Sums(), ["--split", "tests"], "evaluation.split: 'tests'"),
        (Sums(), ["--records", "0"], "--records"),
    ],
)
def test_mistakes_are_one_line(evaluated, task, options, line):
    err, result = evaluated(task, *options)
    assert result is None and line in err and err.count("\n") == 1


def test_the_section():
    assert Evaluation().records == 200 and Evaluation().accuracy is None
    with pytest.raises(RecipeError, match=r"evaluation.pass_at: 6: exceeds samples, 5"):
        Recipe.parse(VALUES | {"evaluation": {"samples": 5, "pass_at": [1, 6]}})


def test_lm_eval_tasks_are_scored_as_a_direct_computation_scores_them(evaluated, folder, tmp_path):
    """Two-way questions in a local folder; the model is run on one text at a time, its prompt takes in no memory."""
    pytest.importorskip("lm_eval")
    questions = [
        {"q": f"{a}+{b}=", "choices": [str(a + b), str(a * 7)], "gold": a % 2} for a in range(1, 9) for b in (2, 5)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    data = {"data_files": {"test": str(tmp_path / "sums.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "two_way", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}"}
    task |= {"doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "two_way.yaml").write_text(json.dumps(task))
    with pytest.MonkeyPatch.context() as patch:  # seconds of shell commands that describe the machine
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
        out, result = evaluated(Sums(), "--no-accuracy", "--tasks", "two_way", "--include", tmp_path)

    loaded = run.load(folder, "cpu")
    form = TextFormat(loaded.tokenizer, memory="response")

    @torch.no_grad()
    def nats(question, answer):
        one = form.example(Example(question, answer))
        ids, memory = one.ids[:-1], one.memory[:-1]  # without eos
        logits_TV = loaded.model(torch.tensor([ids]), memory_mask=torch.tensor([memory])).logits[0]
        loss_T = torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(ids[1:]), reduction="none")
        return loss_T[one.prompt - 1 :].sum()

    right = [min((0, 1), key=lambda i, one=one: nats(one["q"], one["choices"][i])) == one["gold"] for one in questions]
    assert result["lm_eval"]["two_way"]["acc"] == sum(right) / len(right)
    assert 0 < sum(right) < len(right) and "two_way" in out
    assert "gone.yaml: no such file" in evaluated(Sums(), "--tasks", str(tmp_path / "gone.yaml"))[0]
