"""What trackers are told, by packages that only listen."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from commands import call
from undertow.recipe import Recipe
from undertow.training import run, trackers
from undertow.training.callbacks import event, read_metrics


class Listening:
    """What both packages offer of themselves to accelerate: `init`, and a run with `log` and `finish`."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **about):
        self.begun.append(about)
        return SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=self._finish)

    def _finish(self):
        self.finished += 1


@pytest.fixture(params=["trackio", "wandb"])
def listening(request, monkeypatch):
    made = Listening()
    monkeypatch.setitem(sys.modules, request.param, made)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, real=importlib.util.find_spec: name in sys.modules or real(name)
    )
    return request.param, made


def test_a_run_is_told_to_its_tracker(listening, values, tmp_path):
    """As the metrics file has it, step for step; one run a folder, which a resumed one goes on with."""
    name, heard = listening
    training = values["training"] | {"max_steps": 2, "log_every": 1, "save_every": 1, "report_to": [name]}
    recipe = Recipe.parse(values | {"training": training, "evaluation": {"points": 1, "rows": 2, "new_tokens": 1}})
    folder = run.folder_for(recipe, tmp_path / "one")
    run.train(recipe, folder, device="cpu")
    (begun,) = heard.begun
    assert begun["project"] == "undertow" and begun["name"] == "one" and begun["resume"] == "allow"
    assert begun["config"]["training"]["report_to"] == [name] and heard.finished == 1
    counted = ("step", "tokens", "flops", "tokens_per_second")
    written = [
        (line["step"], {event(key): value for key, value in line.items() if key not in counted})
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    assert heard.logged == written and {"train/loss", "eval/bits_per_byte"} <= {k for _, v in written for k in v}
    again, other = trackers.started([name], folder, recipe), trackers.started([name], tmp_path / "two", recipe)
    assert len(again) == len(other) == 1
    first, same, apart = heard.begun
    assert same == first and apart != first


def test_a_tracker_that_is_not_installed(values, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = Recipe.parse(values | {"training": values["training"] | {"report_to": ["wandb"]}})
    with pytest.raises(
        ValueError, match=r"^training.report_to: wandb is not installed: pip install 'undertow\[wandb\]'$"
    ):
        run.folder_for(recipe, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_a_tracker_that_nobody_knows(values, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.parse(values).to_yaml().replace("report_to: []", "report_to: [paper]"))
    status, _, said = call(capsys, "train", path, "--out", tmp_path / "run")
    assert status == 2 and "report_to" in said and "trackio" in said and not (tmp_path / "run").exists()
