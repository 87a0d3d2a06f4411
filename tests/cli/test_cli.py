"""The command line: what it loads, what it says about mistakes, how it exits."""

import subprocess
import sys

import pytest

from commands import call


def test_help_loads_no_torch():
    code = "import sys, undertow_cli; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_verb(capsys):
    for arguments in ((), ("--help",), ("-h",)):
        status, out, _ = call(capsys, *arguments)
        assert status == 0
        assert all(verb in out for verb in ("show", "train", "compare", "eval", "generate", "check", "data", "sweep"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("trai",), "No such command 'trai'"),
        (("train",), "Missing argument"),
        (("train", "x.yaml", "--foo"), "No such option: --foo"),
        (("train", "nothing.yaml"), "nothing.yaml: no such file"),
        (("show", "nothing.yaml"), "nothing.yaml: no such file"),
        (("compare", "nothing.yaml"), "nothing.yaml: no such file"),
        (("train", "bad.yaml"), "bad.yaml: training.max_step: unknown key (value 3); did you mean 'max_steps'?"),
        (("train", "good.yaml", "--set", "training.max_steps=x"), "training.max_steps: 'x': should be a valid integer"),
        (("train", "good.yaml", "--set", "nonsense"), "--set nonsense: must be section.key=value"),
        (("train", "good.yaml", "--resume"), "--resume: there is no runs/good-N to continue"),
        (("train", "good.yaml", "--device", "gpu"), "--device 'gpu': allowed are auto, cpu, cuda, mps"),
        (("train", "good.yaml", "--out", "full"), "full is not empty; --resume continues"),
        (("eval", "nothing"), "nothing"),
        (("generate", "nothing", "x"), "nothing: no such folder"),
        (("generate", "full", "x"), "full: holds no trained model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    backbone = "backbone: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}\n"
    (tmp_path / "good.yaml").write_text(backbone + "training: {max_steps: 3}\n")
    (tmp_path / "bad.yaml").write_text(backbone + "training: {max_step: 3}\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert err.startswith("error: ") and line in err and err.count("\n") == 1


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("UNDERTOW_DEBUG", "1")
    status, _, err = call(capsys, "train", "nothing.yaml")
    assert status == 2 and "Traceback" in err and "error: nothing.yaml: no such file" in err


def test_interrupted(capsys, monkeypatch, tmp_path):
    from undertow import recipe

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load_any", interrupt)
    (tmp_path / "x.yaml").touch()
    status, _, err = call(capsys, "train", tmp_path / "x.yaml")
    assert status == 130 and err == "stopped by SIGINT; --resume goes on from the last checkpoint\n"
