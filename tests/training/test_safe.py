"""What a run never does: run pickled code or code of a model's repository, write outside its folder, tell a secret."""

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import trained

from commands import call
from undertow.recipe import Recipe
from undertow.training import checkpoints

SOURCE = Path(__file__).parents[2] / "src" / "undertow"
SECRETS = {"HF_TOKEN": "hf_secretsecretsecret", "OPENAI_API_KEY": "sk-secret-2", "UNDERTOW_API_KEY": "key-secret-3"}


def calls():
    """(file, line, dotted name, keywords) of every call in the package."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield path.name, node.lineno, ast.unparse(node.func), keywords


def test_nothing_in_the_package_unpickles_or_runs_text():
    """torch.load only with weights_only=True, numpy without pickles, YAML by the safe loader; no eval, exec, shell."""
    found = list(calls())
    assert len(found) > 3000
    for where in found:
        *_, name, keywords = where
        assert name not in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "os.system",
            "os.popen",
            "yaml.unsafe_load",
        ), where
        assert "trust_remote_code" not in keywords and keywords.get("shell", "False") == "False", where
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", where
        if name in ("np.load", "numpy.load", "np.save"):
            assert keywords.get("allow_pickle") == "False", where
        if name == "yaml.load":
            assert keywords.get("Loader") == "Loader", where
        if name == "AutoModelForCausalLM.from_pretrained":
            assert keywords.get("use_safetensors") == "True", where


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """A run trained with secrets in its environment, and killed before its result: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    short = values["training"] | {"max_steps": 4, "save_every": 2, "tensorboard": True}
    recipe = Recipe.parse(values | {"training": short, "evaluation": {"points": 1, "rows": 4, "new_tokens": 2}})
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        trained(recipe, folder)
    return folder


def test_secrets_of_the_environment_are_in_no_file(whole):
    for path in whole.rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values()), path


def test_secrets_of_the_environment_are_in_no_error(whole, tmp_path, capsys, monkeypatch):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "x.yaml").write_text("backbone: {family: lama}\n")
    for command in (["train", tmp_path / "x.yaml"], ["generate", tmp_path, "a"], ["eval", tmp_path / "none"]):
        status, said, errors = call(capsys, *command)
        assert status == 2 and not any(secret in said + errors for secret in SECRETS.values())


def test_no_file_of_a_run_is_a_pickle_of_more_than_tensors_and_numbers(whole):
    """What Trainer keeps of optimiser and generators: zipped tensors and numbers, which `weights_only` reads."""
    states = [path for path in whole.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert {path.name for path in states} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in states:
        globals_ = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        assert all(name.startswith("numpy") for name in globals_), (path, globals_)


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize(
    "how", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["zip", "bare"]
)
def test_pickled_code_in_a_checkpoint_never_runs(whole, tmp_path, capsys, name, how):
    """With checksums that are right, as whoever put it there would write them."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    how({"x": Touch(tmp_path / "ran")}, checkpoint / name)
    path = checkpoint / checkpoints.CHECKSUMS
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: checkpoints._sha256(checkpoint / name)}))
    assert checkpoints.problem(checkpoint) is None
    status, _, errors = call(capsys, "train", folder, "--resume", "--device", "cpu")
    assert not (tmp_path / "ran").exists()
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), errors[-2000:]


def test_a_model_that_brings_code_does_not_run_it(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "model" / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Y: pass\n")
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "y",
        "auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Y"},
    }
    path.write_text(json.dumps(config))
    status, _, errors = call(capsys, "generate", folder, "a", "--device", "cpu")
    assert status == 2 and errors.count("\n") == 1 and not (tmp_path / "ran").exists()


def test_a_run_writes_only_into_its_folder_and_its_cache(values, tmp_path, monkeypatch):
    """Watched: every file that is opened to write, renamed, made or removed while it trains."""
    import os
    import sys
    import tempfile

    seen, on = [], [True]
    allowed = (str(tmp_path), values["data"]["cache_dir"], tempfile.gettempdir() + "/torch", "/dev/", "/proc/")

    def watch(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if on[0] and (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")):
            seen.append(str(arguments[0]))

    sys.addaudithook(watch)
    short = values["training"] | {"max_steps": 1}
    try:
        trained(
            Recipe.parse(values | {"training": short, "evaluation": {"points": 0, "rows": 4, "new_tokens": 2}}),
            tmp_path / "r",
        )
    finally:
        on[0] = False
    outside = [path for path in seen if not path.startswith(allowed) and not re.search(r"__pycache__|\.pyc", path)]
    assert len(seen) > 10 and not [path for path in outside if os.path.isabs(path)], outside
