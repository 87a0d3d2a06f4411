"""What is printed where: names that look like markup, terminals of other encodings, readers that are gone, signals."""

import ast
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress
from rich.table import Table

import undertow
import undertow_cli as cli
from commands import call
from undertow.training.progress import progress
from undertow_cli import console

ODD = "a[/b] [bold]c :smile: é"
BACKBONE = "backbone: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}\n"
SOURCES = sorted(Path(undertow.__file__).parent.rglob("*.py")) + sorted(Path(cli.__file__).parent.glob("*.py"))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ODD.replace("/", "|")
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"name: '{folder.name}'\n{BACKBONE}time: 'T2MLR(0, 1)'\n", encoding="utf-8")
    return Path(folder.name)


def test_what_looks_like_markup_is_printed_as_it_is():
    terminal = console.Terminal()
    terminal.file = io.StringIO()
    table = Table(ODD)
    table.add_row(ODD)
    terminal.print(ODD)
    terminal.print(table)
    terminal.print(ODD, style="bold")
    assert terminal.file.getvalue().count(ODD) == 4


def test_bars_take_names_as_they_are():
    terminal = console.Terminal()
    terminal.file, terminal._force_terminal = io.StringIO(), True
    with progress(terminal) as bars:
        bars.bars.add_task(ODD, total=1, said=ODD)
        bars.say(ODD)
    assert terminal.file.getvalue().count(ODD) >= 3


def test_no_console_of_ours_reads_markup():
    """Consoles, columns of bars and spinners in all of the source: those that would read names as markup."""
    calls = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path.name}:{node.lineno}"
            if name in ("Console", "TextColumn"):
                calls += 1
                assert said.get("markup") == "False" or said == {"stderr": "True"}, where  # a bar that escapes
            assert said.get("markup") != "True" and name != "from_markup", where
            if name in ("status", "input") and node.args:
                assert isinstance(node.args[0], ast.Call) and node.args[0].func.id == "Text", where
    assert calls >= 5 and Progress


def said_in(encoding, *arguments):
    """(status, stdout, stderr) of a command on terminals that know this encoding alone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    try:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return end.value.code, *(stream.buffer.getvalue().decode(encoding) for stream in (sys.stdout, sys.stderr))
    finally:
        sys.stdout, sys.stderr = before


@pytest.mark.parametrize(("encoding", "mark", "letter"), [("ascii", "<", "\\xe9"), ("cp1252", "<", "é")])
def test_a_terminal_that_knows_fewer_letters(recipe, encoding, mark, letter):
    """Our own drawings in ASCII, other letters as an escape."""
    status, out, err = said_in(encoding, "show", recipe)
    assert status == 0 and err == "", err
    assert f"input {mark} memory 0" in out and out.startswith(recipe.name.replace("é", letter))
    status, out, err = said_in(encoding, "show", f"{recipe}x")
    assert status == 2 and f"{recipe.name}x: no such file; did you mean".replace("é", letter) in err


def test_letters_no_encoding_has():
    text = os.fsdecode(b"caf\xe9 ") + "\u4e16 │─ ✓ \ud800"
    assert text.encode("ascii", "undertow.plain") == rb"caf\xe9 \u4e16 |- + \ud800"
    assert text.encode("utf-8", "undertow.plain") == rb"caf\xe9 " + "\u4e16 │─ ✓ ".encode() + rb"\ud800"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", ".", b"caf\xe9"), ("show", ".", "--lens", b"\xff"), ("data", b"\xe9"),
        ("show", ".", "--set", b"\xe9"), ("train", ".", "--out", b"\xe9"), ("export", ".", "--out", b"\xe9"),
        ("show", ".", "--svg", b"x\xe9"),
    ],
)  # fmt: skip
def test_arguments_that_are_no_text(recipe, arguments):
    bad = next(argument for argument in arguments if isinstance(argument, bytes))
    given = (os.fsdecode(argument) if isinstance(argument, bytes) else argument for argument in arguments)
    status, _, err = said_in("utf-8", *given)
    assert status == 2 and err == f"error: {bad.decode('ascii', 'backslashreplace')}: is not UTF-8\n"


def test_letters_that_the_locale_does_not_know():
    """Python reads arguments in the locale's encoding: bytes that are UTF-8 are taken as that, but for paths."""
    typed = "é".encode().decode("ascii", "surrogateescape")
    assert console.as_text([typed, 5]) == ["é", 5]
    with pytest.raises(ValueError, match=r"\\xc3\\xa9: this locale has no such letters"):
        console.as_text(Path(typed))


def test_a_reader_that_is_gone(recipe, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as end:
            cli.main(["show", str(recipe)])
    assert end.value.code == 141 and capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk(recipe, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            cli.main(["show", str(recipe)])
    assert end.value.code == 2 and capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_streams_that_are_closed(recipe, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        patch.setattr(sys, "stdout", None)
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", str(recipe)])
    assert end.value.code == 2 and "a conversation needs a terminal" in capsys.readouterr().err


def test_a_path_that_is_mistyped_is_said_before_anything_loads(tmp_path):
    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    code = "import sys; from undertow_cli import main\nfor verb in sys.argv[1:]:\n try: main([verb, 'runs/dem-1'])\n"
    code += " except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    verbs = ["show", "train", "compare", "sweep", "eval", "generate", "serve", "check", "report"]
    done = subprocess.run([sys.executable, "-c", code, *verbs], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 False\n" * len(verbs)
    lines = done.stderr.splitlines()
    assert len(lines) == len(verbs) and all(line.endswith("; did you mean 'runs/demo-1'?") for line in lines), lines


ARGUMENTS = {
    "show": ["."], "train": ["."], "compare": ["."], "sweep": ["."], "eval": ["."], "generate": [".", "x"],
    "serve": [".", "--port", "0"], "check": ["."], "report": ["."], "bench": ["--list"], "data": ["S5"],
    "import": [".", "--out", "x"], "export": [".", "--out", "x"],
}  # fmt: skip


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_ends_with_words_of_its_own(recipe, verb, monkeypatch, capsys):
    module = sys.modules[cli.VERBS[verb][0].__module__]
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(module, "quiet", lambda number=number: os.kill(os.getpid(), number))
        status, _, err = call(capsys, verb, *ARGUMENTS[verb])
        assert status == 128 + number and err == f"stopped by {number.name}; {cli.VERBS[verb][1]}\n"
    assert ("--resume" in err) == (verb in ("train", "compare", "sweep"))


def test_a_text_that_is_stopped_ends_its_line(recipe, monkeypatch, capsys):
    from undertow.evaluation import samples
    from undertow.training import run

    def stopped(*args, **keywords):
        console.out.print("begun", end="")
        raise KeyboardInterrupt

    form = SimpleNamespace(say_spelt=lambda *args: None)
    monkeypatch.setattr(run, "load", lambda *args: SimpleNamespace(model=None, format=form))
    monkeypatch.setattr(samples, "sample", stopped)
    status, out, err = call(capsys, "generate", recipe, "It has ")
    assert (status, out, err) == (130, "It has begun\n", "stopped by SIGINT; the text ends here\n")
