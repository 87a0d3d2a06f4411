"""The house rules that a machine can check."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

from undertow import mixers
from undertow.methods import METHODS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "undertow"
OURS = sorted((ROOT / "src").rglob("*.py"))
CORE = ("plan", "edges", "schedules", "execute", "store", "reference")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_nothing_outside_methods_names_a_method():
    """A new method costs one file. Docstrings may cite where an idea comes from; code may not know it."""
    named = re.compile(r"\b(" + "|".join(METHODS) + r")\(|import .*\b(" + "|".join(METHODS) + r")\b")
    for path in OURS:
        if "methods" not in path.parts and path != SOURCE / "__init__.py":  # which makes them public
            for number, line in enumerate(lines(path), 1):
                assert not named.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_the_library_knows_no_command_line():
    """Which lies beside it and above it. Docstrings may say so."""
    for path in SOURCE.rglob("*.py"):
        assert "undertow_cli" not in path.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[2], path


def test_the_core_stays_small():
    assert sum(len(lines(SOURCE / f"{name}.py")) for name in CORE) < 1300
    assert len(lines(SOURCE / "mixers.py")) < 400
    assert all(len(lines(p)) <= 150 for p in (SOURCE / "methods").glob("*.py"))
    for cls in vars(mixers).values():
        if isinstance(cls, type) and issubclass(cls, mixers.Mixer) and cls is not mixers.Mixer:
            assert len(inspect.getsource(cls).splitlines()) <= 40, cls.__name__


def test_long_files_give_a_reason():
    for path in OURS:
        if len(lines(path)) > 400:
            assert "400 lines" in "\n".join(lines(path)[:20]), f"{path.relative_to(ROOT)} is long and does not say why"


def test_no_swallowed_errors_and_no_prints():
    for path in OURS:
        text = path.read_text()
        assert not re.search(r"except( Exception)?:", text), path
        assert not re.search(r"^\s*print\(", text, re.M), path


def test_what_the_makefile_tests_is_there():
    named = set(re.findall(r"tests/\w[^\s\\]*", (ROOT / "Makefile").read_text("utf-8")))
    assert len(named) > 10
    for path, _, function in (name.partition("::") for name in named):
        assert f"def {function}(" in (ROOT / path).read_text("utf-8") if function else (ROOT / path).exists(), path


def test_help_does_not_load_torch():
    code = "import sys, undertow_cli; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
