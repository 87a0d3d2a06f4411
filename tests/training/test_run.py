"""Runs: what a folder holds, exact resumption, torn checkpoints, NaN."""

import contextlib
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from training_runs import Kill, losses, trained, weights
from transformers import TrainerCallback

from rounding import assert_copied, assert_same
from undertow.recipe import Recipe, RecipeError
from undertow.training import checkpoints, run
from undertow.training.callbacks import read_metrics


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """A run that was never interrupted: (folder, result)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, trained(Recipe.parse(values), folder)


def test_folder_and_result(whole):
    folder, result = whole
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "model", "result.json"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["steps"] == 8 and result["tokens"] == 8 * 4 * 32 and result["training_flops"] > 0
    assert 0 < result["bits_true"] < 10 and 0 < result["bits_training"] < 10
    assert result["generation_tokens_per_second"] > 0 and result["training_tokens_per_second"] > 0
    assert losses(folder)[-1][1] < losses(folder)[0][1]
    curve = [line for line in read_metrics(folder / "metrics.jsonl") if "eval_bits_per_byte" in line]
    assert [line["step"] for line in curve] == [4, 8]
    assert [line["flops"] for line in curve] == [result["training_flops"] / 2, result["training_flops"]]
    assert not list(folder.rglob("training_args.bin"))
    assert result["data"]["rule"] == "hash" and result["data"]["train_files"] > 0


def test_an_evaluation_text_that_is_not_there_is_said_before_training(values, tmp_path):
    recipe = Recipe.parse(values | {"evaluation": values["evaluation"] | {"text": str(tmp_path / "none.txt")}})
    with pytest.raises(ValueError, match="text: '.*none.txt': no such file or folder"):
        run.folder_for(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_is_bit_for_bit(whole, recipe, tmp_path):
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, folder, callbacks=[Kill(5)])
    assert not (folder / "result.json").exists()
    result = trained(recipe, folder, resume=True)
    expected = weights(whole[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    assert losses(folder) == losses(whole[0])
    assert result["bits_true"] == whole[1]["bits_true"]


def test_resume_skips_a_torn_checkpoint(whole, recipe, tmp_path):
    folder = tmp_path / "torn"
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, folder, callbacks=[Kill(7)])
    newest = folder / "checkpoints" / "checkpoint-6" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="checkpoint-6: model.safetensors is torn"):
        trained(recipe, folder, resume=True)
    assert losses(folder) == losses(whole[0])


def test_resume_of_a_finished_run_and_of_one_that_only_lacks_its_result(whole, recipe, tmp_path):
    folder = tmp_path / "done"
    trained(recipe, folder)
    before = (folder / "result.json").read_text()
    assert trained(recipe, folder, resume=True) == json.loads(before)
    (folder / "result.json").unlink()
    assert trained(recipe, folder, resume=True)["bits_true"] == json.loads(before)["bits_true"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_torn_files_are_seen(whole, tmp_path, name):
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(whole[0] / "checkpoints" / "checkpoint-8", folder)
    assert checkpoints.problem(folder) is None
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    assert "torn" in checkpoints.problem(folder)
    (folder / name).unlink()
    assert checkpoints.problem(folder) is not None
    with pytest.warns(UserWarning, match="skipping checkpoint"):
        assert checkpoints.newest_complete(tmp_path) is None


def test_resuming_another_recipe_names_the_difference(whole, recipe):
    folder = whole[0]
    with pytest.raises(RecipeError, match=r"training.learning_rate is 0.003 there and 0.1 here"):
        run.folder_for(recipe.replace("training", learning_rate=0.1), folder, resume=True)
    run.folder_for(recipe.replace("training", log_every=5), folder, resume=True)  # changes no weight
    run.folder_for(recipe, folder, resume=True)


def test_no_flag_of_resuming_deletes_what_is_there(whole, recipe, tmp_path):
    """A published script took the resume flag "False" as the order to delete the whole output folder."""
    folder = tmp_path / "kept"
    shutil.copytree(whole[0], folder)
    (folder / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for resume in (False, "False", None):
        with pytest.raises(ValueError, match="not empty") if not resume else contextlib.nullcontext():
            trained(recipe, folder, resume=resume)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("optimiser", [pytest.param("muon", marks=pytest.mark.slow), "nanochat"])
def test_two_optimisers_in_one_resume_bit_for_bit(values, tmp_path, optimiser):
    """With everything else that depends on the step: momentum, decay, learning rates, micro-batches, pauses."""
    settings = {
        "optimiser": optimiser,
        "learning_rate": 0.02,
        "decay": "stable",
        "accumulation": 2,
        "lr_groups": {"gate": 3.0},
    }
    data = values["data"] | {"pause": {"token": "<|endoftext|>", "mean": 0.2}}
    recipe = Recipe.parse(
        values
        | {"training": values["training"] | settings, "data": data}
        | {"evaluation": {"points": 0, "rows": 4, "new_tokens": 2}}
    )
    trained(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "killed", callbacks=[Kill(5)])
    trained(recipe, tmp_path / "killed", resume=True)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "killed").items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1][1] < losses(tmp_path / "whole")[0][1]


def test_folders(recipe, tmp_path):
    assert run.folder_for(recipe, root=tmp_path).name == "tiny-1"
    assert run.folder_for(recipe, root=tmp_path).name == "tiny-2"
    assert run.folder_for(recipe, resume=True, root=tmp_path).name == "tiny-2"
    with pytest.raises(ValueError, match="not empty; --resume"):
        run.folder_for(recipe, tmp_path / "tiny-1")
    with pytest.raises(FileNotFoundError, match="no .*other-N to continue"):
        run.folder_for(recipe.replace(name="other"), resume=True, root=tmp_path)


def test_nan_stops_and_keeps_the_last_good_checkpoint(recipe, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))

    folder = tmp_path / "nan"
    with pytest.raises(FloatingPointError, match=r"step 5: the loss is nan; .*checkpoint-3") as caught:
        trained(recipe, folder, callbacks=[Poison()])
    assert "\n" not in str(caught.value)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert all(t.isfinite().all() for t in load_file(folder / "checkpoints/checkpoint-3/model.safetensors").values())


def test_nothing_to_resume_starts_anew_with_a_warning(recipe, tmp_path):
    folder = tmp_path / "early"
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, folder, callbacks=[Kill(1)])
    with pytest.warns(UserWarning, match="no complete checkpoint"), pytest.raises(KeyboardInterrupt):
        trained(recipe, folder, resume=True, callbacks=[Kill(1)])


def test_rows_longer_than_the_backbone_and_too_many_tokens(values):
    long = values | {"backbone": values["backbone"] | {"max_position_embeddings": 16}}
    with pytest.raises(RecipeError, match="data.seq_len: 32 exceeds the backbone's 16"):
        run.build_model(Recipe.parse(long))
    small = Recipe.parse(values | {"backbone": values["backbone"] | {"vocab_size": 300}})
    with pytest.raises(ValueError, match="384 tokens, but the model's vocab_size is 300"):
        run.build_model(small, run.open_data(small).tokenizer)


def test_what_was_saved_is_what_auto_loads(whole, recipe):
    from transformers import AutoModelForCausalLM

    loaded = run.load(whole[0], "cpu")
    assert loaded.recipe == recipe and loaded.model.schedule == recipe.schedule
    again = AutoModelForCausalLM.from_pretrained(whole[0] / "model").eval()
    ids = torch.arange(12)[None]
    assert_copied(again, loaded.model)
    with torch.no_grad(), warnings.catch_warnings():
        assert_same(again(ids).logits, loaded.model(ids).logits)


def test_every_model_sees_the_same_rows_in_the_same_order(values, tmp_path, monkeypatch):
    seen, collate = [], run.collate

    def record(rows):
        seen[-1].append([row["input_ids"].tolist() for row in rows])
        return collate(rows)

    monkeypatch.setattr(run, "collate", record)
    for name, parts in (("plain", {"time": None, "schedule": None}), ("carried", {})):
        seen.append([])
        short = values | parts | {"training": values["training"] | {"max_steps": 3}}
        trained(Recipe.parse(short), tmp_path / name)
    assert len(seen[0]) >= 3 and seen[0][:3] == seen[1][:3]


def test_torn_weights_are_one_line(whole, tmp_path):
    shutil.copytree(whole[0] / "model", tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()  # as `save_pretrained` leaves it
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="the weights are torn"):
        run.load(tmp_path, "cpu")
