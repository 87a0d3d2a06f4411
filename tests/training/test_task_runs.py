"""Training on tasks and on streams: what a run writes, and that it goes on exactly where it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import Kill, losses, trained, weights

import tiny_tasks
from commands import call
from undertow import recipe as recipes
from undertow.data import collate
from undertow.recipe import Recipe, RecipeError
from undertow.tasks import TASKS
from undertow.training import run
from undertow.training.callbacks import read_metrics

TESTS = Path(__file__).parents[1]
STREAM = {"source": "Pages(count=120)", "stream": True, "documents": 12}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, cls in tiny_tasks.CLASSES.items():
        monkeypatch.setitem(TASKS, name, cls)


def parse(values, source, **training):
    """A tiny recipe on a task; its logs are not at the steps of its checkpoints."""
    data = {key: values["data"][key] for key in ("seq_len", "cache_dir")} | {"vocab_size": 300}
    data |= source if isinstance(source, dict) else {"source": source}
    if "Parity" in str(data["source"]):  # it brings its tokenizer
        del data["vocab_size"]
    settings = values["training"] | {"log_every": 2, "max_steps": 5} | training
    evaluation = {"points": 1, "rows": 4, "new_tokens": 2}
    return Recipe.parse(values | {"data": data, "training": settings, "evaluation": evaluation})


def same_weights(a, b):
    expected = weights(b)
    return all(torch.equal(tensor, expected[name]) for name, tensor in weights(a).items())


def timeless(result):
    return {key: value for key, value in result.items() if not key.endswith("tokens_per_second")}


@pytest.mark.parametrize(
    "source",
    ["Sums()", pytest.param("Parity()", marks=pytest.mark.slow), pytest.param(STREAM, marks=pytest.mark.slow)],
    ids=["answers", "tags", "stream"],
)
def test_a_task_is_trained_and_resumes_bit_for_bit(source, values, tmp_path):
    """What a log averages must not reach back over a checkpoint, or the resumed run would log something else."""
    recipe = parse(values, source, decay="constant")
    result = trained(recipe, tmp_path / "whole")
    assert 0 < result["waste"]["train"] < 0.6 and 0 <= result["waste"]["validation"] < 0.6
    assert result["bits_true"] > 0 and losses(tmp_path / "whole")[-1][1] < losses(tmp_path / "whole")[0][1]
    assert [step for step, _ in losses(tmp_path / "whole")] == [1, 2, 3, 4, 5]
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "killed", callbacks=[Kill(4)])
    again = trained(recipe, tmp_path / "killed", resume=True)
    assert timeless(again) == timeless(result) == timeless(json.loads((tmp_path / "killed/result.json").read_text()))
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    (tmp_path / "killed/result.json").unlink()  # killed after its last checkpoint: no step is left to take
    assert timeless(trained(recipe, tmp_path / "killed", resume=True)) == timeless(result)
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    saved = run.load(tmp_path / "whole", "cpu")
    assert saved.recipe == recipe and saved.tokenizer.get_vocab() == run.open_data(recipe).tokenizer.get_vocab()


def test_a_stream_is_read_in_order_past_its_end_and_from_where_it_was(values, tmp_path, monkeypatch):
    """With micro-batches: each row exactly once, no row read again after a kill, none left out."""
    recipe = parse(values, STREAM | {"source": "Pages(count=30)"}, accumulation=2, max_steps=7)
    seen = []

    def record(rows):
        seen.extend(row["input_ids"].tolist() for row in rows)
        return collate(rows)

    monkeypatch.setattr(run, "collate", record)
    stream = run.open_data(recipe).train.head(7 * 4 * 2)
    with pytest.warns(UserWarning, match="the stream ended after"):
        expected = [stream[i]["input_ids"].tolist() for i in range(len(stream))]
    with pytest.warns(UserWarning, match="the stream ended after"), pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "killed", callbacks=[Kill(5)])
    assert seen[: 5 * 8] == expected[: 5 * 8]
    seen.clear()
    with pytest.warns(UserWarning, match="the stream ended after"), pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "killed", resume=True, callbacks=[Kill(7)])
    assert seen == expected[3 * 8 :], "from the checkpoint of step 3 on"


@pytest.mark.slow
def test_workers_change_nothing(values, tmp_path):
    for workers in (0, 2):
        trained(parse(values, STREAM, workers=workers, max_steps=3), tmp_path / str(workers))
    assert same_weights(tmp_path / "0", tmp_path / "2")


@pytest.mark.slow
def test_pauses_in_a_stream_of_examples(values, tmp_path):
    """Labels, positions and the memory mask stay aligned; what is drawn depends on the row's number."""
    pause = {"pause": {"token": "<|endoftext|>", "mean": 0.5, "only_recurrent": True}}
    recipe = parse(values, {"source": "Sums()", "stream": True, "documents": 20} | pause, max_steps=4)
    trained(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "killed", callbacks=[Kill(4)])
    trained(recipe, tmp_path / "killed", resume=True)
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_resuming_on_other_data_names_the_difference(values, tmp_path):
    run.folder_for(parse(values, "Sums()"), tmp_path / "a")
    with pytest.raises(RecipeError, match="data.source is .*'train': 60.* there and .*'train': 9.* here"):
        run.folder_for(parse(values, "Sums(train=9)"), tmp_path / "a", resume=True)
    run.folder_for(parse(values, {"source": {"task": "Sums", "train": 60}}), tmp_path / "a", resume=True)
    with pytest.raises(RecipeError, match="data.stream is False there and True here"):
        run.folder_for(parse(values, {"source": "Sums()", "stream": True}), tmp_path / "a", resume=True)


def test_a_model_from_scratch_has_the_tasks_vocabulary(values):
    recipe = parse(values, "Parity()")
    assert run.build_model(recipe).config.get_text_config().vocab_size == 5
    assert run.build_model(parse(values, "Sums()")).config.get_text_config().vocab_size == 300


@pytest.mark.slow
def test_two_processes_read_alternate_batches_and_resume(values, tmp_path):
    """Two ranks of half the batch are trained on the rows of one process, and go on after a kill."""
    values = values | {"backbone": values["backbone"] | {"attention_dropout": 0.0}}
    for batch, name, ranks in ((4, "one", 1), (2, "two", 2)):
        recipe = parse(values, STREAM, batch_size=batch, max_steps=8)
        recipe.save(tmp_path / f"{name}.yaml")
        _torchrun(ranks, tmp_path / f"{name}.yaml", tmp_path / name)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(two[key], one[key], atol=1e-4) for key in one), "the same rows in every step"
    _torchrun(2, tmp_path / "two.yaml", tmp_path / "killed", kill=5)
    _torchrun(2, tmp_path / "two.yaml", tmp_path / "killed", resume=True)
    assert same_weights(tmp_path / "killed", tmp_path / "two")
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]  # on CPUs, too
    launcher += ["--mixed_precision=no", "--dynamo_backend=no"]
    _torchrun(2, tmp_path / "two.yaml", tmp_path / "launched", launcher=launcher)
    assert same_weights(tmp_path / "launched", tmp_path / "two")


DRAWN = {"time": "T2MLR(0, 1)", "schedule": {"kind": "Jacobi", "K": 3, "sample": [1, 2, 3], "loss": "mean"}}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(values, tmp_path):
    """The rows of a step dealt out anew: the same losses, of drawn sweeps too, up to the order of sums."""
    values = values | DRAWN | {"backbone": values["backbone"] | {"attention_dropout": 0.0}}
    made = {
        n: parse(values, "Sums()", batch_size=4 // n, accumulation=2, max_steps=8, save_every=3, log_every=2)
        for n in (1, 2)
    }
    trained(made[1], tmp_path / "whole")
    for before, after in ((1, 2), (2, 1)):
        folder = tmp_path / str(before)
        for ranks, more in ((before, {"kill": 5}), (after, {"resume": True})):
            made[ranks].save(tmp_path / "recipe.yaml")
            _torchrun(ranks, tmp_path / "recipe.yaml", folder, **more)
        lines, expected = (read_metrics(place / "metrics.jsonl") for place in (folder, tmp_path / "whole"))
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        for mine, other in zip(lines, expected, strict=True):
            wanted = {key: x for key, x in other.items() if "loss" in key}
            assert {key: mine[key] for key in wanted} == pytest.approx(wanted, abs=2e-5)
        a, b = weights(folder), weights(tmp_path / "whole")
        assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in b)
    assert any("sweep_loss_3" in line for line in lines)


def test_a_step_keeps_its_rows(values, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(parse(values, "Sums()", batch_size=4, save_every=1), tmp_path, callbacks=[Kill(2)])
    for batch_size, accumulation in ((2, 2), (1, 4), (4, 1)):
        dealt = parse(values, "Sums()", batch_size=batch_size, accumulation=accumulation, save_every=1)
        run.folder_for(dealt, tmp_path, resume=True)
    other = parse(values, "Sums()", batch_size=2, save_every=1)
    with pytest.raises(RecipeError, match="cannot resume, a step has 4 rows there and 2 here .*2 x accumulation 1 x 1"):
        run.folder_for(other, tmp_path, resume=True)
    assert recipes.load(tmp_path).training.batch_size == 4  # the one refused was not written
    (tmp_path / "checkpoints" / "checkpoint-1" / "step.json").write_text("{")
    with pytest.raises(RecipeError, match="cannot resume, training.batch_size is 4 there and 2 here"):
        run.folder_for(other, tmp_path, resume=True)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r}); sys.path.insert(0, {tests!r} + "/training")
import tiny_tasks
from commands import call
from training_runs import Kill, trained
from undertow import recipe
from undertow.tasks import TASKS
TASKS.update(tiny_tasks.CLASSES)
try:
    trained(recipe.load({recipe!r}), __import__("pathlib").Path({folder!r}), resume={resume}, callbacks=[Kill({kill})])
except KeyboardInterrupt:
    pass
"""


def _torchrun(ranks, recipe, folder, kill=-1, resume=False, launcher=None):
    script = recipe.with_suffix(".py")
    script.write_text(SCRIPT.format(tests=str(TESTS), recipe=str(recipe), folder=str(folder), resume=resume, kill=kill))
    launcher = launcher or ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, "-m", *launcher, str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_mistake_in_the_data_leaves_no_folder(capsys, tmp_path, values):
    (tmp_path / "torn.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}\n{"question": "tor')
    changed = values | {"data": {"source": {"task": "GSM8K", "path": str(tmp_path / "torn.jsonl")}, "seq_len": 64}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed))
    status, _, err = call(capsys, "train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--device", "cpu")
    assert status == 2 and "torn.jsonl, line 2: not JSON" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


MISTAKES = {  # recipes that can be read, but not be trained
    "too few positions": {"backbone": {"max_position_embeddings": 16}},
    "no such layer": {"time": "T2MLR(0, 9)"},
    "too small a vocabulary": {"backbone": {"vocab_size": 300}},
    "heads that do not divide": {"backbone": {"num_attention_heads": 3}},
    "nothing to train": {"training": {"train_only": "nothing"}},
    "no such attention": {"backbone": {"attn_implementation": "flash_attention_2"}},
    "no such folder": {"data": {"source": "/nowhere/at/all"}},
    "no such weights": {"pretrained": "/nowhere/at/all"},
    "no strength": {"time": "LRT(1)", "training": {"recurrent_weight": {"begin": 0.0, "end": 1.0}}},
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_recipe_that_cannot_be_trained_leaves_no_half_of_a_run(values, tmp_path, capsys, what):
    wrong = dict(MISTAKES[what])
    made = {key: values[key] | wrong.get(key, {}) for key in ("training", "data")}
    other = (
        {"pretrained": wrong["pretrained"]} if "pretrained" in wrong else values["backbone"] | wrong.get("backbone", {})
    )
    made["backbone"] = other
    made["time"] = wrong.get("time", values["time"])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values | made))
    status, _, err = call(capsys, "train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--device", "cpu")
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert not (tmp_path / "run").exists(), sorted((tmp_path / "run").rglob("*"))
