"""Tokenizers of which no class is named are what their files say."""

import json

import pytest

from undertow.data import load_tokenizer
from undertow.data.tokenizer import END, tokenizer_hash

TEXT = " a , b 's\r\nnaïve"


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(root)
    return {path.name: path.read_text() for path in root.iterdir() if path.is_file()}


def folder(root, **files):
    """Files by their names, `__` for the dot; values that are no text as JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("named", [None, "TheirOwnTokenizer", "TokenizersBackend"])
@pytest.mark.parametrize("model", [None, "llama", "gpt2", "nobody_knows_it"])
def test_without_a_known_class_it_is_the_same_tokenizer(tokenizer, saved, tmp_path, named, model):
    config = json.loads(saved["tokenizer_config.json"])
    config.pop("tokenizer_class")
    if named is not None:
        config["tokenizer_class"] = named
    files = {"tokenizer__json": saved["tokenizer.json"], "tokenizer_config__json": config}
    loaded = load_tokenizer(folder(tmp_path, **files, **({"config__json": {"model_type": model}} if model else {})))
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT) and loaded.decode(loaded.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    "beside",
    [
        {"special_tokens_map__json": {"eos_token": {"content": END}, "bos_token": END}},
        {"tokenizer_config__json": {"eos_token": {"__type": "AddedToken", "content": END}, "bos_token": END}},
        {"config__json": {"model_type": "llama", "eos_token_id": 0, "bos_token_id": 0}},
        {"generation_config__json": {"eos_token_id": [0, 1], "bos_token_id": 0}},
    ],
)
def test_special_tokens_come_from_any_file(tokenizer, saved, tmp_path, beside):
    loaded = load_tokenizer(folder(tmp_path, tokenizer__json=saved["tokenizer.json"], **beside))
    assert (loaded.eos_token, loaded.bos_token) == (END, END) and loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_the_file_alone_ends_with_the_token_that_usually_does(tokenizer, saved, tmp_path):
    folder(tmp_path, tokenizer__json=saved["tokenizer.json"])
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.warns(UserWarning, match=r"no file says which token ends a text; <\|endoftext\|> is taken"):
            loaded = load_tokenizer(name)
        assert (loaded.eos_token, loaded.bos_token) == (END, None) and loaded.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("names", [("vocab__json", "merges__txt"), ("encoder__json", "vocab__bpe")])
def test_a_vocabulary_and_its_merges(tokenizer, saved, tmp_path, names):
    model = json.loads(saved["tokenizer.json"])["model"]
    merges = "#version: 0.2\n" + "\n".join(
        pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]
    )
    folder(tmp_path, **dict(zip(names, (model["vocab"], merges), strict=True)))
    folder(tmp_path, special_tokens_map__json={"eos_token": END})
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT) and loaded.decode(loaded.encode(TEXT)) == TEXT


def test_the_chat_template_comes_along(saved, tmp_path):
    files = {"tokenizer__json": saved["tokenizer.json"], "special_tokens_map__json": {"eos_token": END}}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert load_tokenizer(folder(tmp_path, **files, chat_template__jinja=template)).chat_template == template


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README__md": "nothing"}, "holds neither tokenizer.json nor vocab.json and merges.txt"),
        ({"tokenizer__json": "{"}, "EOF while parsing"),
        ({"tokenizer__json": "", "tokenizer_config__json": "[]"}, "tokenizer_config.json: is list; must be an object"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, files, said):
    with pytest.raises(ValueError, match="^tokenizer: '.*': neither a tokenizer's folder nor its hub id") as error:
        load_tokenizer(folder(tmp_path, **files))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"holds tokenizer.model but no tokenizer.json: .* pip install sentencepiece"):
        load_tokenizer(folder(tmp_path, tokenizer__model="x"))
