"""The method pages: every method has one, its plan is the one drawn today, and the code on it runs."""

import importlib.util
import re
from pathlib import Path

import pytest

from undertow.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


def script(path):
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw = script(ROOT / "docs" / "draw.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_plans_are_drawn_as_they_are(page):
    text = page.read_text()
    assert page.stem == "index" or draw.BLOCK.search(text), f"{page.name} shows no plan"
    assert draw.drawn(text) == text, "run python docs/draw.py"


def test_every_method_has_a_page_and_a_line_in_the_index():
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    pages = "\n".join(page.read_text() for page in PAGES if page.stem != "index")
    for name in METHODS:
        assert re.search(rf"`{name}\(", index), f"{name} is missing in the index"
        assert re.search(rf"`{name}\b", pages), f"{name} has no page"
    for linked in re.findall(r"\]\((\w+\.md)\)", index):
        assert (ROOT / "docs" / "methods" / linked).exists(), linked


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "docs").glob("*.md")], ids=lambda p: p.stem)
def test_files_named_exist(page):
    for path in re.findall(r"(?:recipes|docs|benchmarks|tests)/[\w/]+\.(?:yaml|md|py|json|png|svg)", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_tables_of_results_are_those_that_were_measured():
    """docs/results.md holds what `python comparisons/report.py` sets in from the result files, nothing else."""
    report = script(ROOT / "comparisons" / "report.py")
    page = (ROOT / "docs" / "results.md").read_text()
    assert report.fill(page, ROOT / "comparisons" / "results") == page
    files = {path.stem for path in (ROOT / "comparisons").glob("*.yaml")}
    assert set(re.findall(r"<!-- results: (\w+) -->", page)) == files
