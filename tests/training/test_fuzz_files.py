"""Task files, tokenizers and runs, damaged at random: read, or one line says what is wrong, and nothing is written."""

import gzip
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import trained

from commands import call
from undertow.data.tokenizer import load_tokenizer
from undertow.recipe import Recipe
from undertow.tasks import files
from undertow.training import checkpoints

RECORDS = [{"question": f"what is {i} + {i}?", "answer": str(2 * i), "steps": ["a", "é"], "n": i} for i in range(12)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same records in every kind of file."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("files")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    (folder / "x.jsonl").write_text(lines)
    (folder / "x.json").write_text(json.dumps(RECORDS))
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "x.csv").write_text("question,answer\n" + "".join(f'"{r["question"]}",{r["answer"]}\n' for r in RECORDS))
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "x.parquet")
    return sorted(folder.iterdir())


def damage(raw, rng):
    """One to four changes of some bytes."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        kind = rng.choice(["flip", "cut", "insert", "delete", "zero", "repeat"])
        if kind == "cut":
            del raw[at:]
        elif kind == "delete":
            del raw[at : at + rng.choice([1, 4, 64])]
        elif kind == "insert":
            raw[at:at] = rng.choice(
                [b"\x00", b"\xff\xfe", b"\n", b'"', b"{", b"[" * 5000, b"9" * 5000, b"null", rng.randbytes(8)]
            )
        elif kind == "zero":
            raw[at : at + 16] = bytes(len(raw[at : at + 16]))
        elif kind == "repeat":
            raw[at:at] = raw[at : at + 50]
        elif at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
    return bytes(raw)


def one_line(error):
    return str(error) and len(str(error).splitlines()) == 1


def tried(read, allowed, what):
    """1 if it is read; anything but an allowed error of one line fails the test."""
    try:
        read()
    except allowed as error:
        assert one_line(error), f"{what}: {str(error)!r}"
        return 0
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    return 1


def task_files(sources, folder, seeds):
    count = 0
    for seed in seeds:
        rng = random.Random(seed)
        source = sources[seed % len(sources)]
        path = folder / source.name
        path.write_bytes(damage(source.read_bytes(), rng))
        count += tried(
            lambda path=path: list(files.read(path, ["question"])), (ValueError, OSError), f"seed {seed}, {source.name}"
        )
    assert 0 < count < len(seeds)


def test_damaged_task_files(sources, tmp_path):
    task_files(sources, tmp_path, range(200))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_nesting_without_end_is_one_line(tmp_path, name):
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(ValueError, match="not JSON") as caught:
        list(files.read(tmp_path / name))
    assert one_line(caught.value)


@pytest.mark.slow
def test_many_damaged_task_files(sources, tmp_path):
    task_files(sources, tmp_path, range(200, 5200))


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    short = values["training"] | {"max_steps": 2, "save_every": 1}
    trained(Recipe.parse(values | {"training": short, "evaluation": {"points": 0, "rows": 4, "new_tokens": 2}}), folder)
    return folder


def tokenizers(whole, folder, seeds):
    count = 0
    names = ["tokenizer.json", "tokenizer_config.json"]
    for seed in seeds:
        rng = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            shutil.copy(whole / "model" / name, folder / name)
        path = folder / names[seed % 2]
        path.write_bytes(mutated_json(path.read_bytes(), rng) if rng.random() < 0.5 else damage(path.read_bytes(), rng))
        count += tried(lambda: load_tokenizer(folder), ValueError, f"seed {seed}, {path.name}")
    assert 0 < count < len(seeds)


def mutated_json(raw, rng):
    """One value somewhere in JSON replaced, renamed or deleted."""
    values = json.loads(raw)
    inner = values
    while True:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.7:
            inner = inner[key]
            continue
        if rng.random() < 0.3:
            del inner[key]
        else:
            inner[key] = rng.choice([None, 0, -1, 10**12, 1.5, "x", "", "é", [], {}, [1], {"x": 1}, True, "../../x"])
        return json.dumps(values).encode()


def test_damaged_tokenizers(whole, tmp_path):
    tokenizers(whole, tmp_path / "tokenizer", range(40))


@pytest.mark.slow
def test_many_damaged_tokenizers(whole, tmp_path):
    tokenizers(whole, tmp_path / "tokenizer", range(40, 1040))


# ---------------------------------------------------------------------- runs


def reshape(tensors):
    name = sorted(tensors)[0]
    return tensors | {name: torch.zeros(3, 5)}


def rename(tensors):
    name = sorted(tensors)[-1]
    return {key: value for key, value in tensors.items() if key != name} | {"x." + name: tensors[name]}


WEIGHTS = {
    "a wrong shape": reshape,
    "a missing tensor": lambda tensors: dict(sorted(tensors.items())[1:]),
    "a tensor too many": lambda tensors: tensors | {"what.weight": torch.zeros(2)},
    "a renamed tensor": rename,
    "no tensor": lambda tensors: {},
    "a tensor without a number": lambda tensors: tensors | {sorted(tensors)[0]: torch.zeros(0)},
}


def tree(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def refused(capsys, folder, *said):
    """Both commands that read a run say one line, and write nothing."""
    before = tree(folder)
    for command in (["generate", folder, "a"], ["eval", folder]):
        status, _, errors = call(capsys, *command, "--device", "cpu")
        lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), errors[-2000:]
        assert all(word in lines[0] for word in said), lines[0]
    assert tree(folder) == before


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(whole, tmp_path, capsys, what):
    """Sealed by whoever changed them: their checksum is right."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "model" / "model.safetensors"
    save_file(WEIGHTS[what](load_file(path)), path, {"format": "pt"})
    (folder / "model" / checkpoints.CHECKSUMS).unlink()
    refused(capsys, folder, "model")


CONFIGS = {
    "not JSON": lambda values: "{",
    "a list": lambda values: [],
    "empty": lambda values: {},
    "another type": lambda values: values | {"model_type": "x"},
    "a type without methods": lambda values: values | {"model_type": "llama"},
    "a type of our backbone's": lambda values: values["backbone"],
    "no backbone": lambda values: {key: value for key, value in values.items() if key != "backbone"},
    "an unknown method": lambda values: values | {"time": {"method": "x"}},
    "a method that is none": lambda values: values | {"time": 3},
    "a field of none": lambda values: values | {"time": values["time"] | {"x": 1}},
    "a layer of none": lambda values: values | {"time": values["time"] | {"end": 99}},
    "another width": lambda values: values | {"backbone": values["backbone"] | {"hidden_size": 64}},
    "a width that is none": lambda values: values | {"backbone": values["backbone"] | {"hidden_size": "x"}},
    "no heads": lambda values: values | {"backbone": values["backbone"] | {"num_attention_heads": 0}},
    "more layers": lambda values: values | {"backbone": values["backbone"] | {"num_hidden_layers": 3}},
    "code of its own": lambda values: values | {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "y"},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_does_not_fit_is_refused(whole, tmp_path, capsys, what):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "model" / "config.json"
    made = CONFIGS[what](json.loads(path.read_text()))
    path.write_text(made if isinstance(made, str) else json.dumps(made))
    refused(capsys, folder)


@pytest.mark.parametrize("name", ["recipe.yaml", "model/tokenizer.json", "model/model.safetensors"])
def test_a_file_of_noise_is_refused(whole, tmp_path, capsys, name):
    for i, raw in enumerate((b"", b"\xff\x00noise" * 20)):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(raw)
        refused(capsys, folder)


@pytest.mark.slow
def test_many_damaged_runs(whole, tmp_path, capsys):
    """Any file of a run: it is used, or one line says why not. A resumed one is trained, or one line says why not."""
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    statuses = []
    for seed in range(300):
        rng, folder = random.Random(seed), tmp_path / "run"
        shutil.copytree(whole, folder)
        path = folder / names[seed % len(names)]
        raw = path.read_bytes()
        path.write_bytes(mutated_json(raw, rng) if path.suffix == ".json" and rng.random() < 0.6 else damage(raw, rng))
        if rng.random() < 0.5:
            (folder / "model" / checkpoints.CHECKSUMS).unlink(missing_ok=True)
        command = rng.choice(
            [["generate", folder, "a", "--max-new-tokens", 2], ["eval", folder], ["train", folder, "--resume"]]
        )
        if command[0] == "train":
            (folder / "result.json").unlink(missing_ok=True)
        status, _, errors = call(capsys, *command, "--device", "cpu")
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert status == 0 or (status == 2 and len(lines) == 1), f"seed {seed}, {path.name}: {errors[-2000:]}"
        statuses.append(status)
        shutil.rmtree(folder)
    assert 0 in statuses and 2 in statuses
    with capsys.disabled():
        print("\nruns that went on, that said one line:", statuses.count(0), statuses.count(2))
