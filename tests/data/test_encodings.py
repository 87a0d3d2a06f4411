"""Texts that are not UTF-8: read as what they are, or left out, and said either way."""

import codecs
import warnings

import pytest

from undertow.data import load_corpus
from undertow.data.encodings import DAMAGED, UTF8, WINDOWS, text_of

TEXT = "Le café est naïf, größer “als” je: 5 €.\r\n"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (TEXT.encode(), (TEXT, UTF8)),
        (TEXT.encode("utf-8-sig"), ("\ufeff" + TEXT, UTF8)),  # UTF-8 is kept byte for byte
        (TEXT.encode("cp1252"), (TEXT, WINDOWS)),
        ("café".encode("cp1252"), ("café", WINDOWS)),
        (TEXT.encode("utf-16"), (TEXT, "UTF-16")),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), (TEXT, "UTF-16")),
        (TEXT.encode("utf-32"), (TEXT, "UTF-32")),
        ("流れる水".encode()[:-1], ("流れる\ufffd", DAMAGED)),
        (TEXT.encode() + b"\xff", (TEXT + "\ufffd", DAMAGED)),
        (b"", ("", UTF8)),
        (b"a\0b", None),
        (b"\x89PNG\r\n\x1a\n\xfe\xed", None),
        ("Привет, мир".encode("cp1251"), None),
        ("流れる水は腐らず".encode("shift-jis"), None),
        ("流水不腐".encode("gbk"), None),
        (b"\xff\xfea", None),
        (b"\xff\xfe", None),
    ],
)
def test_text_of(data, found):
    assert text_of(data) == found


def test_one_warning_counts_what_was_not_utf8_and_names_a_file_of_each_kind(tmp_path):
    for i in range(20):
        (tmp_path / f"f{i:02}.txt").write_bytes(f"{i} café größe".encode("cp1252" if i % 2 else "utf-8"))
    (tmp_path / "wide.txt").write_text("wide", encoding="utf-16")
    for name in ("x.bin", "y.bin"):
        (tmp_path / name).write_bytes(b"\0\1")
    with pytest.warns(UserWarning) as said:
        corpus = load_corpus(str(tmp_path))
    (message,) = [str(one.message) for one in said]
    assert message == (
        f"13 of 23 files are not text in UTF-8: 10 read as Windows-1252 (e.g. {tmp_path}/f01.txt), "
        f"1 read as UTF-16 (e.g. {tmp_path}/wide.txt), 2 left out, as no text (e.g. {tmp_path}/x.bin)"
    )
    texts = {document.text for document in corpus.train + corpus.validation}
    assert texts == {f"{i} café größe" for i in range(20)} | {"wide"}
    held = corpus.reading.to_dict()
    assert held["encodings"] == {"Windows-1252": 10, "UTF-16": 1} and held["no_text"] == 2


def test_nothing_is_said_of_utf8(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} é", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_corpus(str(tmp_path))
