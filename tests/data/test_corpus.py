import shutil

import pytest

from undertow.data import load_corpus
from undertow.data.corpus import corpus_hash


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def names(documents):
    return {document.name for document in documents}


def test_splits_are_disjoint_and_deterministic(folder):
    corpus, again = load_corpus(str(folder)), load_corpus(str(folder))
    assert corpus == again and corpus_hash(corpus.train) == corpus_hash(again.train)
    assert len(corpus.train) + len(corpus.validation) == 80 and 1 <= len(corpus.validation) <= 12
    assert not names(corpus.train) & names(corpus.validation)
    assert corpus.train_bytes == sum(len(document.text.encode()) for document in corpus.train)


def test_the_split_depends_on_names_only(folder, tmp_path):
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    held = names(load_corpus(str(folder)).validation)
    for name in sorted(path.name for path in moved.glob("*.txt"))[:20]:
        if f"{folder.name}/{name}" not in held:
            (moved / name).unlink()
    assert names(load_corpus(str(moved)).validation) == held


def test_equal_texts_count_once(tmp_path):
    texts = {f"t{i}": f"text {i % 10}" for i in range(60)}
    corpus = load_corpus(write(tmp_path / "d", **texts))
    found = [document.text for document in corpus.train + corpus.validation]
    assert sorted(found) == sorted(f"text {i}" for i in range(10))


def test_few_files_still_give_both_splits(tmp_path):
    corpus = load_corpus(write(tmp_path / "d", a="one", b="two"))
    assert len(corpus.train) == len(corpus.validation) == 1


def test_files_folders_globs_and_lists_find_the_same(folder):
    whole = load_corpus(str(folder))
    assert load_corpus(f"{folder}/**/*.txt") == whole
    parts = load_corpus([f"{folder}/*.txt", f"{folder}/sub/*.txt"])
    assert parts.train_bytes + parts.validation_bytes == whole.train_bytes + whole.validation_bytes
    files = [str(path) for path in sorted(folder.glob("*.txt"))]
    assert len(load_corpus(files, validation=f"{folder}/sub").train) == len(files)


def test_a_file_is_in_the_same_split_however_it_is_named(folder):
    listed = load_corpus([str(path) for path in folder.glob("*.txt")])
    assert names(listed.validation) == {n for n in names(load_corpus(str(folder)).validation) if "/sub/" not in n}


def test_text_is_read_byte_for_byte(tmp_path):
    data = b"\xef\xbb\xbfa\r\nb\rc\n\n"
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_text("b")
    corpus = load_corpus(str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt"))
    assert corpus.train[0].text.encode() == data


def test_what_is_not_text_is_left_out(tmp_path):
    folder = write(tmp_path / "d", a="one", b="two", blank=" \n")
    (tmp_path / "d" / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "d" / "binary").write_bytes(b"a\0b")
    (tmp_path / "d" / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d" / ".hidden").write_text("hidden")
    write(tmp_path / "d" / ".git", config="hidden too")
    with pytest.warns(UserWarning, match="^2 of 5 files are not text in UTF-8: 2 left out"):
        corpus = load_corpus(folder)
    assert names(corpus.train + corpus.validation) == {"d/a.txt", "d/b.txt"}


def test_explicit_validation_is_kept_whole_and_leaves_training(tmp_path):
    train = write(tmp_path / "x" / "d", a="one", b="two", c="three")
    held = write(tmp_path / "y" / "d", a="another text of the same name", z="two")
    corpus = load_corpus(train, validation=held)
    assert [document.text for document in corpus.validation] == ["another text of the same name", "two"]
    assert [document.text for document in corpus.train] == ["one", "three"]


@pytest.mark.parametrize(
    ("source", "validation", "said"),
    [
        ("missing", None, "source: '{root}/missing': no such file or folder; allowed: 'stdlib', text files"),
        ("empty", None, "source: '{root}/empty': holds no text in UTF-8; allowed: 'stdlib', text files"),
        ("*.rst", None, "source: '{root}/*.rst': holds no text"),
        ("binary", None, "source: '{root}/binary': not text in UTF-8"),
        ("one.txt", None, "source: '{root}/one.txt': a single text cannot be split by file; give more files or `val"),
        ("one.txt", "missing", "validation: '{root}/missing': no such file"),
        ("one.txt", "one.txt", "source: '{root}/one.txt': no text is left to train on"),
    ],
)
def test_errors_are_one_line_and_name_the_source(tmp_path, source, validation, said):
    write(tmp_path, one="text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError) as error:
        load_corpus(f"{tmp_path}/{source}", validation and f"{tmp_path}/{validation}")
    assert str(error.value).startswith(said.format(root=tmp_path)) and "\n" not in str(error.value)


def test_no_source_at_all():
    with pytest.raises(ValueError, match="source: .*names nothing"):
        load_corpus([])


def test_the_standard_library():
    corpus = load_corpus()
    found = names(corpus.train) | names(corpus.validation)
    assert {"stdlib/ast.py", "stdlib/asyncio/base_events.py", "topics/lambda"} <= found
    for part in ("test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"):
        assert not any(f"/{part}/" in name for name in found)
    assert not any("_sysconfigdata" in name for name in found)
    assert corpus.train_bytes > 8e6 and corpus.validation_bytes > 2e5
    assert not {d.text for d in corpus.train} & {d.text for d in corpus.validation}
