"""Names: what can only be a path fails at once, and a hub that does not answer is asked once."""

import time
from pathlib import Path

import pytest

from undertow import hub
from undertow.backbone.pretrained import load_backbone, source_of
from undertow.data import load_tokenizer


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "runs" / "small-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["./x", "../x", "~/x", "/x/y", "a/b/c", "x/", "a//b", "runs/smal-1", "x.gguf", "x.safetensors", "a/tokenizer.json"]
    + ["my model", "C:\\x", "", Path("x"), "-x"],
)
def test_what_can_only_be_a_path_fails_at_once(name, monkeypatch):
    monkeypatch.setattr(hub, "offline", lambda: pytest.fail("the hub was asked"))
    if name == "":
        name = "./none"
    for attempt in (hub.is_local, source_of, load_tokenizer, load_backbone):
        with pytest.raises(ValueError, match="no such file or folder") as error:
            attempt(name)
        assert "\n" not in str(error.value)


def test_what_a_folder_holds_is_said():
    with pytest.raises(ValueError, match="^runs/smal-1: no such file or folder; runs holds small-1$"):
        hub.is_local("runs/smal-1")


def test_files_here_and_names_there():
    assert hub.is_local("runs/small-1") and hub.is_local(Path("runs"))
    for name in ("gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M", "org/name-1.5_b.v2"):
        assert not hub.is_local(name)


@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:9", "127.0.0.1:9"])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, proxy):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("urllib.request.getproxies", lambda: {} if proxy is None else {"https": proxy})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: proxy is None)
    begun = time.monotonic()
    assert hub.offline() and source_of("org/name")["local_files_only"] is True
    with pytest.raises(ValueError, match="neither a tokenizer's folder nor its hub id") as error:
        load_tokenizer("org/name")
    with hub.asked_once():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE and "\n" not in str(error.value) and time.monotonic() - begun < hub.SECONDS


def test_a_hub_that_answers_is_asked(monkeypatch):
    import socket

    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("urllib.request.getproxies", dict)
        assert not hub.offline() and "local_files_only" not in source_of("org/name")
