"""Recipes, comparisons and sweeps, damaged in every way at random: they load, or one line says what is wrong."""

import copy
import functools
import random
import re
import warnings
from pathlib import Path

import pytest
import yaml

from undertow import recipe as recipes
from undertow.analysis import compare
from undertow.recipe import RecipeError
from undertow.training import sweep

ROOT = Path(__file__).parents[2] / "recipes"
FILES = sorted(ROOT.rglob("*.yaml"))

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**30, -(10**30), 2**63, 0.0, -0.5, 0.1, 1.0, 1e308, 1e-320,
    float("nan"), float("inf"), -float("inf"), "", " ", "x", "0", "1e-3", "null", "~", "é", "流れ",
    "\u202e", "\ud83d\ude00",
    "\x00", "a\nb", "../x", "/etc/passwd", "T2MLR", "T2MLR(", "T2MLR(0, 1)", "LRT()", "Cyclic(4, 1)", "Cyclic(n=-1)",
    "Converge()", "Jacobi(10**9)", "Jacobi(1e9)", "BlockLoop(10**6)", "BlockLoop(times=1000000000000)", "ReuseMap([1])",
    "S5()", "S5(train=-1)", "__import__('os').system('x')", "Cyclic(__import__('os'), 1)", "(" * 300, "-" * 300 + "1",
    [], [1], ["x"], [None], [[]], [1, 2, 3, 4], {}, {"x": 1}, {"method": "LRT"}, {"method": 3}, {"method": ["LRT"]},
    {"kind": "Cyclic"}, {"kind": None}, {"task": "S5"}, {"task": {}}, {"method": "T2MLR", "start": "x"},
    {1: 2}, {None: 1},
]  # fmt: skip
KEYS = [
    "x",
    "",
    "é",
    "name",
    "seed",
    "method",
    "kind",
    "task",
    "model_type",
    "vocab_size",
    0,
    None,
    1.5,
    True,
    "__class__",
    "a.b",
]
TEXTS = [
    "\t", "{", "}", "[", "]", ":", "- ", "&a ", "*a", "&a [*a]", "!!python/object/apply:os.system [x]", "!x ", "%", "@",
    "`", '"', "'", "|", ">", "? ", "#", "---\n", "...\n", "\x00", "\x85", "\u2028", "\ufeff", "<<: *a",
    "<<: 1\n", "<<: {x: 1}\n",
    "9" * 5000, "2001-99-99", "12:99:99", "0o9", "0b2", "1_000", ".inf", "!!int x", "!!float x", "!!binary x",
    "!!set {a, b}",
    "!!timestamp x", "[" * 1200, "{a: " * 1200, "é", "\ud83d\ude00", "? [a]\n: b\n", "? {a: b}\n: c\n",
    "x: &a {y: *a}\n",
]  # fmt: skip


@functools.cache
def text_of(path):
    return path.read_text()


def places(value, found=None):
    """Every (container, key) in nested values."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found)
    return found


def retype(value):
    made = {int: str, float: str, bool: str, str: lambda x: [x], list: lambda x: {"x": x}}
    return made.get(type(value), lambda _: 1)(value)


def change(values, rng):
    """One change somewhere in plain values, in place."""
    container, key = rng.choice(places(values))
    kind = rng.choice(["delete", "retype", "rename", "value", "value", "nest", "swap", "number", "add", "typo"])
    if kind == "delete":
        del container[key]
    elif kind == "retype":
        container[key] = retype(container[key])
    elif kind in ("rename", "typo") and isinstance(container, dict):
        other = rng.choice(KEYS) if kind == "rename" or not isinstance(key, str) else key[:-1]
        container[other] = container.pop(key)
    elif kind == "nest":
        container[key] = rng.choice([{key: container[key]}, [container[key]], {"values": container[key]}])
    elif kind == "swap":
        other, there = rng.choice(places(values))
        container[key] = copy.deepcopy(other[there])
    elif kind == "number" and isinstance(container[key], int | float):
        container[key] = rng.choice([-1, 0, 10**9, 1e30, 0.5, -0.0]) * container[key]
    elif kind == "add" and isinstance(container, dict):
        container[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))


def damage(text, rng):
    """One change somewhere in the text of a file, as bytes."""
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.choice([1, 1, 3, 20, 200]))
    kind = rng.choice(["insert", "insert", "delete", "cut", "repeat", "indent", "bytes", "encoding"])
    if kind == "insert":
        return (text[:at] + rng.choice(TEXTS) + text[at:]).encode("utf-8", "surrogatepass")
    if kind == "delete":
        return (text[:at] + text[end:]).encode()
    if kind == "cut":
        return text[:at].encode()
    if kind == "repeat":
        return (text[:end] + text[at:]).encode()
    if kind == "indent":
        lines = text.splitlines(True)
        i = rng.randrange(len(lines))
        lines[i] = rng.choice([" ", "  ", "\t"]) + lines[i] if rng.random() < 0.5 else lines[i].lstrip()
        return "".join(lines).encode()
    raw = bytearray(text.encode(rng.choice(["utf-8", "utf-16", "utf-32"]) if kind == "encoding" else "utf-8"))
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def mutant(seed):
    """(path of the shipped file, the bytes of a damaged one)."""
    rng = random.Random(seed)
    path = FILES[seed % len(FILES)]
    if rng.random() < 0.3:
        return path, damage(text_of(path), rng)
    values = yaml.safe_load(text_of(path))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if values:
            change(values, rng)
    return path, yaml.safe_dump(values, allow_unicode=rng.random() < 0.5, sort_keys=False).encode("utf-8", "replace")


def load(path):
    """As the command line does that the file is for."""
    text = path.read_bytes()
    if path.parent.name == "sweeps":
        return sweep.load(path)
    return compare.load([path]) if re.search(rb"^models:", text, re.MULTILINE) else recipes.load(path)


def tried(seed, folder):
    """Whether the mutant of this seed loads. Anything but a RecipeError of one line goes up."""
    path, raw = mutant(seed)
    for shipped in (path.parent, ROOT / "small"):  # sweeps name recipes beside them
        link = folder / shipped.name
        link.mkdir(exist_ok=True)
        if not any(link.iterdir()):
            for file in shipped.glob("*.yaml"):
                (link / file.name).write_text(text_of(file))
    target = folder / path.parent.name / path.name
    target.write_bytes(raw)
    try:
        load(target)
    except RecipeError as error:
        assert str(error) and len(str(error).splitlines()) == 1, f"seed {seed}: {str(error)!r}"
        return False
    finally:
        target.write_text(text_of(path))
    return True


def check(seeds, folder):
    loaded, wrong = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            try:
                loaded += tried(seed, folder)
            except Exception as error:
                wrong.append(f"seed {seed} ({mutant(seed)[0].name}): {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong[:40])
    assert 0 < loaded < len(seeds), "mutants all load, or none does: they try nothing"


def test_a_hundred_mutants(tmp_path):
    check(range(100), tmp_path)


@pytest.mark.slow
def test_thousands_of_mutants(tmp_path):
    """At least thirty of every file that is shipped."""
    check(range(100, 100 + max(2500, 30 * len(FILES))), tmp_path)


# ---------------------------------------------------------------------- what the mutants found

FOUND = [
    ("time: {method: [LRT]}", "time.method: ['LRT'] is unknown; did you mean 'LRT'"),
    ("time: {method: {a: 1}}", "time.method: {'a': 1} is unknown; "),
    ("schedule: {kind: Cyclic, true: 1}", "schedule.True: unknown key"),
    ("x: " + "[" * 1200, "nested too deeply"),
    ("seed: " + "9" * 5000, "not readable as YAML"),
    ("seed: !!float x3", "not readable as YAML"),
    ("seed: 2001-99-99", "not readable as YAML"),
    ("name: ../out", "name: '../out': must be usable as the name of a folder"),
    ("name: /tmp/out", "must be usable as the name of a folder"),
    ('name: "a\\nb"', "must be usable as the name of a folder"),
    ("name: " + "x" * 300, "must be usable as the name of a folder"),
    ("backbone: {family: gpt2, hidden_size: 32, num_hidden_layers: '6'}", "num_hidden_layers: '6': must be a whole"),
    ("backbone: {family: gpt2, hidden_size: 32, num_attention_heads: gpt2}", "num_attention_heads: 'gpt2': must be"),
    ("backbone: {family: llama, num_attention_heads: 0}", "num_attention_heads: 0: must be a whole number from 1"),
    (
        "backbone: {family: nanochat, num_hidden_layers: 24000000000}",
        "24000000000: must be a whole number from 1 to 10",
    ),
    ("backbone: {family: undertow_nanochat, hidden_size: 1280000000000}", "1280000000000: must be a whole number"),
]


@pytest.mark.parametrize(("text", "said"), FOUND, ids=range(len(FOUND)))
def test_what_was_no_line_once(text, said, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text + ("" if "backbone" in text else "\nbackbone: {family: llama}\n"))
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


SWEPT = [
    ("recipes: [nowhere.yaml]", "recipes: .*nowhere.yaml: no such file"),
    ("recipes: ['" + "(" * 300 + "']", "recipes: .*too long"),
    ("name: ../../x", "name: '../../x': must be usable as the name of a folder"),
    ("slurm: {setup: [rm -r x]}", "slurm.setup: a recipe runs no commands"),
    ("slurm: {slurm_srun_args: [x]}", "slurm.slurm_srun_args: a recipe runs no commands"),
    ('slurm: {comment: "a\\nrm -r x"}', "slurm.comment: .*may not hold line breaks"),
    ('slurm: {additional_parameters: {"a\\nb": 1}}', "slurm.additional_parameters: .*may not hold line breaks"),
]


@pytest.mark.parametrize(("text", "said"), SWEPT, ids=range(len(SWEPT)))
def test_what_a_sweep_may_not_say(text, said, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        text + ("" if "recipes" in text else "\nbase: {backbone: {family: llama}}") + "\ngrid: {seed: [1]}\n"
    )
    with pytest.raises(RecipeError, match=said) as caught:
        sweep.load(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../x", "/x", "..", ".x", "a/b", "a\\b", ""])
def test_a_comparison_stays_below_its_folder(name, tmp_path):
    for whole, model in ((name, "a"), ("x", name)):
        values = {"name": whole, "backbone": {"family": "llama"}, "models": [{"name": model}], "budget": {"steps": 2}}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(RecipeError, match="must be usable as the name of a folder"):
            compare.load([tmp_path / "c.yaml"])
