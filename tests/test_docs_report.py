"""The page on reports: its code runs, its picture is the one drawn today, its commands exist."""

import re
from pathlib import Path

from undertow.analysis import drawing
from undertow_cli import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "report.md").read_text()


def test_python_blocks_run(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict = {}
    exec(block, names)  # noqa: S102
    assert names["seen"].memory_BT.shape == (2, 12) and capsys.readouterr().out.count("torch.Size([2, 12, 50])") == 4
    assert [view.name for view in names["seen"].sweeps] == ["1 pass", "2 passes", "Cyclic(G=4, n=2)"]


def test_the_plan_is_drawn_as_it_is():
    (recipe,) = re.findall(r"undertow show (recipes/\S+) --svg docs/plan.svg", PAGE)
    assert (ROOT / "docs" / "plan.svg").read_text() == drawing.svg(ROOT / recipe)


def test_commands_exist():
    verbs = {command.name for command in app.registered_commands}
    said = set(re.findall(r"^    undertow (\w+)", PAGE, re.M)) | set(re.findall(r"`undertow (\w+)`", PAGE))
    assert said and said <= verbs
