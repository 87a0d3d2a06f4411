"""The pages: plans as they are drawn today, code that runs, commands that are read, numbers as they were measured."""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys

import pytest

import pages
import undertow as ut
from commands import call
from pages import ROOT
from undertow.methods import METHODS

METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
SLOW = ("docs/howto/wrap.md", "docs/howto/method.md")  # they check whole models
# The README is run by test_readme.py.
RUNNING = [page for page in pages.PAGES[1:] if any(b.language == "python" and b.runs for b in pages.blocks(page))]


def script(path):
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw = script(ROOT / "docs" / "draw.py")
reference = script(ROOT / "docs" / "reference.py")


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda p: p.stem)
def test_plans_are_drawn_as_they_are(page):
    text = page.read_text()
    assert page.stem == "index" or draw.BLOCK.search(text), f"{page.name} shows no plan"
    assert draw.drawn(text) == text, "run python docs/draw.py"


def test_every_method_has_a_page_and_a_line_in_the_index():
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    text = "\n".join(page.read_text() for page in METHOD_PAGES if page.stem != "index")
    for name in METHODS:
        assert re.search(rf"`{name}\(", index), f"{name} is missing in the index"
        assert re.search(rf"`{name}\b", text), f"{name} has no page"


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for path in re.findall(r"(?:recipes|docs|benchmarks|tests|examples)/[\w/]+\.(?:yaml|md|py|json|png|svg)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", pages.FENCE.sub("", text)):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


# ---------------------------------------------------------------------- code on the pages


@pytest.fixture
def registries(monkeypatch):
    """Methods and tasks that a page defines are gone after it."""
    from undertow.tasks import TASKS

    for registry in (METHODS, TASKS):
        for name in registry:
            monkeypatch.setitem(registry, name, registry[name])
    before = [dict(METHODS), dict(TASKS)]
    yield
    for registry, held in zip((METHODS, TASKS), before, strict=True):
        registry.clear()
        registry.update(held)


def slowly(page):
    return pytest.param(page, marks=pytest.mark.slow if pages.name(page) in SLOW else (), id=pages.name(page))


@pytest.mark.parametrize("page", map(slowly, RUNNING))
def test_python_runs(page, registries, capsys, monkeypatch):
    """The blocks of a page one after the other, in one namespace; a text block right after one is what it prints."""
    monkeypatch.chdir(ROOT)
    names: dict = {"__name__": page.stem}
    for block in pages.blocks(page):
        if block.language == "python" and block.runs:
            capsys.readouterr()
            code = "\n" * block.line + block.text  # so that a traceback names the page's own lines
            exec(compile(code, page, "exec"), names)  # noqa: S102
            assert block.output in (None, capsys.readouterr().out), f"{page.name}, line {block.line}"


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_commands_are_read(page):
    for command in pages.commands(page):
        try:
            pages.read(command)
        except Exception as error:
            pytest.fail(f"{page.name}: {command}: {error}")


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_recipes_on_pages_are_recipes(page, tmp_path, monkeypatch):
    from undertow import recipe
    from undertow.analysis import compare
    from undertow.training import sweep

    monkeypatch.chdir(ROOT)
    base = recipe.read_yaml("recipes/small/baseline.yaml")
    for block in pages.blocks(page):
        assert block.language in pages.LANGUAGES or block.language[0] == "{", f"{page.name}: {block.language}"
        if block.language == "json" and block.runs:
            json.loads(block.text)
        for values in pages.documents(block) if block.language == "yaml" and block.runs else ():
            if "recipes" in values:
                (tmp_path / "sweep.yaml").write_text(block.text)
                assert sweep.load(tmp_path / "sweep.yaml").runs
            elif "models" in values:
                (tmp_path / "comparison.yaml").write_text(block.text)
                assert compare.load([tmp_path / "comparison.yaml"]).recipes
            else:
                values = values if "puzzle" in values else _whole(base, values)
                assert recipe.kind_of(values).parse(values, f"{page.name}, line {block.line}")


def _whole(base, values):
    """What a page shows of a recipe, with what it leaves out: of a kind that reads what is shown."""
    whole = base | values
    if "pretrained" in whole["backbone"] and "data" not in values:  # the tokenizer is the weights' own
        whole["data"] = {key: value for key, value in base["data"].items() if key != "vocab_size"}
    if "schedule" in values and "time" not in values:
        whole["time"] = "T2MLR(0, 1)"
    return whole


def test_errors_shown_are_what_is_said(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = [
        (pages.lines(block), block.output)
        for page in pages.PAGES
        for block in pages.blocks(page)
        if block.language == "shell" and block.fails
    ]
    assert shown
    for (command,), output in shown:
        assert call(capsys, *command.split()[1:]) == (2, "", output)


@pytest.mark.parametrize(
    "command, complaint",
    [
        ("undertow shwo recipes/demo.yaml", "no such command"),
        ("undertow train recipes/demo.yaml --sett a=1", "No such option"),
        ("undertow show recipes/small/nothing.yaml", "there is no"),
        ("undertow train recipes/small/lrt.yaml --set training.steps=3", "unknown key"),
        ("make coffee", "make coffee"),
        ("python benchmarks/nothing.py", "there is no"),
        ("pip install 'undertow[magic]'", "magic"),
        ("curl localhost", "mark its block"),
    ],
)
def test_wrong_commands_are_noticed(command, complaint):
    with pytest.raises(Exception, match=re.escape(complaint)):
        pages.read(command)


# ---------------------------------------------------------------------- the site


def test_every_command_and_option_is_in_the_reference():
    said = reference.filled((ROOT / "docs" / "reference" / "cli.md").read_text())
    _, *sections = re.split(r"^## undertow ", said, flags=re.M)
    from undertow_cli import app

    callbacks = {command.name: command.callback for command in app.registered_commands}
    assert [section.split("\n")[0] for section in sections] == list(callbacks)
    for section in sections:
        callback = callbacks[section.split("\n")[0]]
        rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", section, re.M)
        given = [p for p in inspect.signature(callback).parameters if p != "context"]  # typer's own
        assert len(rows) == len(given), section


def test_the_reference_has_every_public_name():
    text = "\n".join(reference.filled(p.read_text()) for p in (ROOT / "docs" / "reference").glob("*.md"))
    methods, schedules = importlib.import_module("undertow.methods"), importlib.import_module("undertow.schedules")
    elsewhere = {"__version__", *methods.__all__, *schedules.__all__}
    for name in set(ut.__all__) - elsewhere:
        assert re.search(rf"^\.\. auto(class|function):: {name}$", text, re.M), name
    for package in ("undertow.analysis", "undertow.evaluation", "undertow.tasks"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            assert f".. automodule:: {module.name}\n" in text, module.name


def test_every_page_is_in_the_table_of_contents():
    from fnmatch import fnmatch

    index = (ROOT / "docs" / "index.md").read_text()
    listed = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.S)).split()
    for page in (ROOT / "docs").rglob("*.md"):
        path = str(page.relative_to(ROOT / "docs").with_suffix(""))
        assert path == "index" or any(fnmatch(path, said.rstrip("?")) for said in listed), path


def test_every_paper_is_in_the_index():
    index = (ROOT / "docs" / "papers.md").read_text()
    files = [*(ROOT / "src" / "undertow" / "methods").glob("*.py"), *(ROOT / "recipes").rglob("*.yaml")]
    for path in files:
        for paper in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text()):
            assert paper in index, f"{path.name} cites {paper}"
    for folder in {path.parent.name for path in (ROOT / "recipes").glob("*/*.yaml")} - {"small", "sweeps"}:
        assert f"recipes/{folder}/" in index, folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(https?:[^\"]*)", page.read_text())
        fetched += re.findall(r"<link[^>]*\shref=\"(https?:[^\"]*)", page.read_text())
        assert not fetched, page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import [\"']?https?:", sheet.read_text()), sheet


# ---------------------------------------------------------------------- numbers


def test_tables_of_results_are_those_that_were_measured():
    """docs/results.md holds what `python comparisons/report.py` sets in from the result files, nothing else."""
    report = script(ROOT / "comparisons" / "report.py")
    page = (ROOT / "docs" / "results.md").read_text()
    assert report.fill(page, ROOT / "comparisons" / "results") == page
    files = {path.stem for path in (ROOT / "comparisons").glob("*.yaml")}
    assert set(re.findall(r"<!-- results: (\w+) -->", page)) == files | set(report.OTHERS)


def test_tables_of_benchmarks_are_those_that_were_measured():
    page = script(ROOT / "benchmarks" / "page.py")
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page.fill(text, ROOT / "benchmarks" / "results") == text
    assert set(re.findall(r"<!-- (\w+) -->\n", text)) - {"end"} == set(page.BLOCKS)


def test_pictures_of_the_explanation_show_what_the_pages_say():
    plots = script(ROOT / "docs" / "plots.py")
    plain, carried = plots.chains(6, 4), plots.chains(6, 4, source=2, target=1)
    assert plain.max() == 4 and (carried[1:, 2] - carried[:-1, 2] == 2).all()
    jacobi, cyclic = plots.wavefront(ut.Jacobi(7)), plots.wavefront(ut.Cyclic(8, 7))
    for k in range(8):
        assert jacobi[k, : k + 1].max() == 0 and cyclic[k, : 8 * k].max(initial=0) == 0
    assert jacobi[7, 8:].max() > 1e-3 and (cyclic[2:].max(1) < jacobi[2:].max(1) / 10).all()


@pytest.mark.slow
def test_costs_and_gradients_of_the_explanation():
    plots = script(ROOT / "docs" / "plots.py")
    found = plots.costs(T=64)
    distance = {(kind, round(passes)): error for kind, points in found.items() for passes, error in points}
    assert 1e-15 < distance["Cyclic(8, n)", 4] < distance["Jacobi(K)", 4] / 10
    assert all(error > 0.03 for _, error in found["Interleaved(S)"])
    falls = plots.gradients(T=32, most=3)
    live, products = falls["Jacobi(15, backward=k)"], falls["Cyclic(8, 4, adjoint=k)"]
    assert all(abs(a - b) < 0.1 * b for (_, a), (_, b) in zip(products, live, strict=True))
    assert falls["Cyclic(8, 4, adjoint=k, solve='cyclic')"][3][1] < products[3][1] / 3
