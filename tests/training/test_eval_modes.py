"""`undertow eval` with what is only measured when asked for: sweeps, buckets, read-ahead."""

import json

import pytest
import yaml

from commands import call


def test_sweeps_buckets_readahead(capsys, tmp_path, monkeypatch, values):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values | {"schedule": "Interleaved(2)"}))
    status, _, err = call(capsys, "train", "tiny.yaml", "--device", "cpu", "--set", "training.max_steps=2")
    assert status == 0, err

    status, out, err = call(capsys, "eval", "runs/tiny-1", "--device", "cpu")
    assert status == 0 and "zero memory" not in out and "t+1" not in out, err
    assert {"modes", "readahead"}.isdisjoint(json.loads((tmp_path / "runs/tiny-1/evaluation.json").read_text()))

    asked = ("--sweeps", "--buckets", 16, "--readahead", 1)
    status, out, err = call(capsys, "eval", "runs/tiny-1", "--device", "cpu", *asked)
    assert status == 0, err
    assert all(word in out for word in ("merged", "interleaved2", "zero memory", "0-15", "t+5", "top-1"))
    result = json.loads((tmp_path / "runs/tiny-1/evaluation.json").read_text())
    trained = result["modes"]["trained"]
    assert trained["bits_per_byte"] == pytest.approx(result["bits_training"], rel=1e-6)
    assert result["modes"]["decoded"]["bits_per_byte"] == pytest.approx(result["bits_true"], rel=1e-6)
    assert [part["name"] for part in trained["sweeps"]] == ["full", "interleaved1", "interleaved2"]
    assert [part["name"] for part in trained["buckets"]] == ["0-15", "16-31"]
    assert [depth["layers"] for depth in result["readahead"]] == [2, 1]

    (tmp_path / "runs/tiny-1/evaluation.json").unlink()
    status, _, err = call(capsys, "eval", "runs/tiny-1", "--device", "cpu", "--readahead", 2)
    assert status == 2 and "skip=2: the model has 2 layers" in err and err.count("\n") == 1
    assert not (tmp_path / "runs/tiny-1/evaluation.json").exists()  # said before anything was measured


def test_exit_rules(capsys, tmp_path, monkeypatch, values):
    """The first line never leaves: it is what the model scores on the same rows."""
    monkeypatch.chdir(tmp_path)
    plain = {k: v for k, v in values.items() if k != "schedule"}
    plain |= {
        "time": None,
        "depth": "BlockLoop(3, inject=True)",
        "evaluation": {"rows": 8, "points": 0, "new_tokens": 4},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plain))
    status, _, err = call(capsys, "train", "tiny.yaml", "--device", "cpu", "--set", "training.max_steps=2")
    assert status == 0, err
    asked = ("--exit", "fixed:1", "--exit", "kl:1e9")
    status, out, err = call(capsys, "eval", "runs/tiny-1", "--device", "cpu", *asked)
    assert status == 0 and "exit rule" in out, err
    result = json.loads((tmp_path / "runs/tiny-1/evaluation.json").read_text())
    whole, fixed, kl = result["exits"]
    assert whole["bits_per_byte"] == pytest.approx(result["bits_true"], rel=1e-5) and whole["rounds"] == 3
    assert (fixed["rounds"], kl["rounds"]) == (1, 2) and fixed["saved"] == pytest.approx(2 / 3)
    status, _, err = call(capsys, "eval", "runs/tiny-1", "--device", "cpu", "--exit", "klx:1")
    assert status == 2 and "klx" in err and err.count("\n") == 1
