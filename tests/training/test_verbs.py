"""The verbs of the command line on a real run, from `train` to `generate`, and a comparison."""

import json
import os

import yaml

from commands import call


def test_train_eval_generate(capsys, tmp_path, monkeypatch, values):
    monkeypatch.chdir(tmp_path)
    values = values | {"training": values["training"] | {"tensorboard": True}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    status, out, err = call(capsys, "train", "tiny.yaml", "--device", "cpu", "--set", "training.max_steps=4")
    assert status == 0, err
    assert (
        " bytes of 11 files, validating on " in out and "split by the hash of the files' names" in out
    )  # both sizes, and how they were split
    assert "runs/tiny-1" in out and "tiny: step 4/4" in out and "bits/byte" in out
    assert list((tmp_path / "runs/tiny-1/tensorboard").iterdir())
    saved = yaml.safe_load((tmp_path / "runs/tiny-1/recipe.yaml").read_text())
    assert saved["training"]["max_steps"] == 4 and saved["time"]["method"] == "T2MLR"
    page, lens = ((tmp_path / "runs/tiny-1" / name).read_text() for name in ("report.html", "lens.json"))
    assert "A text, token by token" in page and "eval_residual" in page
    assert set(json.loads(lens)["gates"]) == {f"memory_mixer {what}" for what in ("gate m", "gate x", "change")}
    assert json.loads((tmp_path / "runs/tiny-1/result.json").read_text())["environment"]["device"] == "cpu"

    status, out, err = call(capsys, "train", "runs/tiny-1", "--resume")
    assert status == 0 and "step" not in out, err  # finished: nothing is trained again

    status, out, err = call(capsys, "eval", "runs/tiny-1", "--schedule", "Cyclic(2, 1)", "--device", "cpu")
    assert status == 0, err
    result = json.loads((tmp_path / "runs/tiny-1/evaluation.json").read_text())
    assert any(name.startswith("Cyclic(G=2, n=1") for name in result["evaluations"])
    assert call(capsys, "eval", "runs/tiny-1", "--set", "training.clip=2")[0] == 2

    for target in ("tiny.yaml", "runs/tiny-1"):
        status, out, err = call(capsys, "show", target)
        assert status == 0 and "tiny" in out and "parameters" in out, out + err

    status, out, err = call(capsys, "show", "runs/tiny-1", "--lens", "import sys\n", "--device", "cpu")
    assert status == 0 and "layer 1" in out and "memory off by" in out, out + err
    for wrong in (("tiny.yaml", "import sys"), ("runs/tiny-1", "")):
        status, out, err = call(capsys, "show", wrong[0], "--lens", wrong[1], "--device", "cpu")
        assert status == 2 and "lens" in err, err

    status, out, err = call(capsys, "check", "runs/tiny-1", "--device", "cpu")
    assert status == 0 and "causal" in out, out + err

    status, out, err = call(capsys, "generate", "runs/tiny-1", "import this", "--max-new-tokens", 5, "--device", "cpu")
    assert status == 0 and out.startswith("import this") and len(out) > len("import this\n"), err
    assert call(capsys, "generate", "runs/tiny-1", "import this", "--max-new-tokens", 5)[1] == out


def test_compare(capsys, tmp_path, monkeypatch, values):
    monkeypatch.chdir(tmp_path)
    shared = {key: values[key] for key in ("backbone", "data", "evaluation")}
    training = {key: value for key, value in values["training"].items() if key != "max_steps"}
    models = [
        {"name": "plain"},
        {"name": "carried", "time": values["time"], "schedule": values["schedule"]},
        {"name": "longer", "flops_of": "carried"},
    ]
    plan = {**shared, "training": training, "budget": {"steps": 5, "match": "tokens"}, "models": models}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(plan))
    status, out, err = call(capsys, "compare", "pair.yaml", "--device", "cpu")
    assert status == 0, err
    folder = tmp_path / "runs" / "pair-1"
    assert "runs/pair-1" in out and "plain" in out and "carried" in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "table.json").read_text())
    plain, carried, longer = (results[name][0] for name in ("plain", "carried", "longer"))
    assert plain["steps"] == carried["steps"] == 5
    assert longer["steps"] > 5
    assert abs(longer["training_flops"] - carried["training_flops"]) <= longer["training_flops"] / longer["steps"]
    curves = json.loads((folder / "curves.json").read_text())["models"]
    assert [len(curves[name][0]) for name in ("plain", "carried", "longer")] == [2, 2, 2]
    page = (folder / "report.html").read_text()
    assert "Paired differences" in page and 'href="carried/report.html"' in page and "comparison.yaml" in page
    assert all((folder / name / "report.html").exists() for name in results)
    assert "plain" in (folder / "table.md").read_text() and "carried:" in (folder / "samples.md").read_text()

    (folder / "carried" / "result.json").unlink()
    untouched = os.stat(folder / "plain" / "model" / "model.safetensors").st_mtime_ns
    status, out, err = call(capsys, "compare", "pair.yaml", "--resume", "--device", "cpu")
    assert status == 0, err
    assert os.stat(folder / "plain" / "model" / "model.safetensors").st_mtime_ns == untouched
    assert (folder / "carried" / "result.json").exists() and not (tmp_path / "runs" / "pair-2").exists()
