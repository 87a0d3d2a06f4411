"""The code on documentation pages: found, run, or at least read by the program it is meant for.

A block that cannot run in a test says so itself, `# not run here: WHY`; its `undertow` commands are read all the same.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer
import yaml

from undertow_cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("text", "python", "shell", "yaml", "json", "html")  # of these, text and html are only shown
NOT_RUN = "# not run here:"
PROGRAMS = ("undertow", "python", "python3", "make", "pip", "torchrun")
FENCE = re.compile(r"^```(\{?[\w-]*\}?)[^\n]*\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block. `output`: the text block that follows it with nothing between, as what it prints."""

    language: str
    text: str
    line: int
    output: str | None = None

    @property
    def runs(self) -> bool:
        return NOT_RUN not in self.text

    @property
    def fails(self) -> bool:
        """Whether it is shown for the error that follows it."""
        return (self.output or "").startswith("error: ")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, made = page.read_text(), []
    found = list(FENCE.finditer(text))
    for i, block in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        shown = after and after[1] == "text" and not text[block.end() : after.start()].strip()
        line = text[: block.start()].count("\n") + 1
        made.append(Block(block[1] or "text", block[2], line, after[2] if shown else None))
    return made


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """Every command line of a page: in shell blocks, in indented blocks, and (with arguments) within a sentence."""
    text = page.read_text()
    prose = FENCE.sub("", text)
    shell = [block for block in blocks(page) if block.language == "shell" and not block.fails]
    found = [line for block in shell for line in lines(block)]
    found += re.findall(rf"^    ((?:{'|'.join(PROGRAMS)}) .+)$", prose, re.M)
    found += [said for said in re.findall(r"`([^`\n]+)`", prose) if re.match(rf"({'|'.join(PROGRAMS)}) [a-z-]", said)]
    return [re.split(r"\s{2,}|\s#\s", line)[0] for line in found]


def lines(block: Block) -> list[str]:
    """The commands of a shell block; of one that does not run, only what comes after `undertow`."""
    whole = block.text.replace("\\\n", " ").splitlines()
    said = [line.strip() for line in whole if line.strip() and not line.lstrip().startswith("#")]
    if block.runs:
        return said
    return [line[line.index("undertow ") :] for line in said if re.search(r"\bundertow ", line)]


def read(command: str) -> None:
    """Have a command line read by the program it is for, without running it; files it names must exist.

    Raises:
        Exception: whatever is wrong with it.
    """
    words = shlex.split(command)
    for word in words:
        if re.match(r"(recipes|comparisons|benchmarks|examples|docs|tests)/.+\.\w+$", word):
            assert (ROOT / word).exists(), f"{command}: there is no {word}"
    if "undertow" in words:
        read_by_us(words[words.index("undertow") + 1 :])
    elif words[0] == "make":
        assert re.search(
            rf"^[\w -]*\b{re.escape(words[1])}\b[^:=]*:(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
        ), command
    elif words[0] == "pip" or words[1:3] == ["-m", "pip"]:
        extras = re.findall(r"undertow\[(.*?)\]", command)
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        assert all(extra in known for said in extras for extra in said.split(",")), command
    else:
        assert words[0] in ("python", "python3"), (
            f"{command}: mark its block with {NOT_RUN!r}, or let the tests read it"
        )
        assert words[1] == "-m" or (ROOT / words[1]).exists() or words[1].isupper(), command


def read_by_us(words: list[str]) -> None:
    """Have the words after `undertow` read by its command line, and the recipe and its changes by what loads them."""
    known = typer.main.get_command(app).commands
    verb, *rest = words
    if verb == "VERB":
        return
    assert verb in known, f"undertow {verb}: no such command"
    if not rest or rest == ["--help"]:
        return
    try:
        values = known[verb].make_context(verb, list(rest)).params
    except typer.BadParameter as error:
        if type(error).__name__ != "MissingParameter" or not all(word.isupper() for word in rest):
            raise
        return  # in a sentence, `undertow generate RUN` may leave out the rest
    target = str(values.get("target", ""))
    if target.startswith("recipes/"):
        from undertow import recipe

        recipe.load_any(ROOT / target, values["overrides"])


def documents(block: Block) -> list[dict]:
    """The mappings of a YAML block: one, or where a key is given again, another from there."""
    parts, keys = [[]], set()
    for line in block.text.splitlines(keepends=True):
        key = re.match(r"(\w+):", line)
        if key and key[1] in keys:
            parts.append([])
            keys = set()
        keys |= {key[1]} if key else set()
        parts[-1].append(line)
    from undertow.recipe_yaml import Loader

    return [yaml.load("".join(part), Loader=Loader) for part in parts]
