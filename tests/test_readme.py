"""The README's code runs, and its commands exist."""

import re
from pathlib import Path

from undertow.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)  # noqa: S102
        assert names["text"].shape[1] > names["ids"].shape[1] and names["loss"].isfinite()


def test_commands_and_files_exist():
    verbs = {command.name for command in app.registered_commands}
    said = re.findall(r"^    undertow (\w+)", README, re.M)
    assert set(said) == verbs
    root = Path(__file__).parents[1]
    for path in re.findall(r"recipes/[\w/]+\.yaml|docs/[\w/]+\.\w+", README):
        assert (root / path).exists(), path


def test_methods_named_are_real():
    import undertow as ut

    for call in re.findall(r"^\| `(\w+\(.*?\))`", README, re.M):
        assert eval(f"ut.{call}", {"ut": ut})  # noqa: S307
