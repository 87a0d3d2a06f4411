"""`undertow serve` and the conversation of `undertow generate`: what they refuse, and what they say."""

import inspect
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from served import byte_tokenizer, completed, tiny
from transformers import LlamaConfig, LlamaForCausalLM

import undertow as ut
from commands import call
from undertow.serve.api import build
from undertow.serve.chat import chat
from undertow.serve.decode import Sampling
from undertow.serve.engine import Limits
from undertow.training.run import load
from undertow_cli.serve import listening, read_key, serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    tiny(time=ut.T2MLR(1, 2)).float().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_keys(tmp_path, monkeypatch):
    assert read_key(None, None) is None
    monkeypatch.setenv("KEY", " abc ")
    assert read_key("KEY", None) == "abc"
    file = tmp_path / "key"
    file.write_text("def\nsecond line\n")
    assert read_key(None, file) == "def"
    for variable, path, why in (("KEY", file, "only one"), ("NONE", None, "NONE: holds no key")):
        with pytest.raises(ValueError, match=why):
            read_key(variable, path)
    file.write_text("two words\n")
    with pytest.raises(ValueError, match="holds no key") as error:
        read_key(None, file)
    assert "two words" not in str(error.value)
    with pytest.raises(OSError, match="nothing"):
        read_key(None, tmp_path / "nothing")


def test_serve_refuses_in_one_line(capsys, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = call(capsys, "serve", tmp_path, "--port", port)
        assert status == 2 and f"--host 127.0.0.1 --port {port}" in err and err.count("\n") == 1
    status, _, err = call(capsys, "serve", tmp_path / "nothing", "--port", 0)
    assert status == 2 and "no such folder" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    status, _, err = call(capsys, "serve", tmp_path)
    assert status == 2 and err == "error: undertow serve needs uvicorn: pip install 'undertow[serve]'\n"


def test_it_listens_on_this_machine_alone():
    """Unless another host is asked for."""
    with listening(inspect.signature(serve).parameters["host"].default, 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", listener.getsockname()[1]), timeout=5)


@pytest.mark.slow
def test_serve_on_a_socket(folder, tmp_path):
    """The whole of it in a process of its own: a stream is cut by the client, and Ctrl-C ends it cleanly."""
    (tmp_path / "key").write_text("s3cret\n")
    run = "from undertow_cli import main; main()"
    command = [sys.executable, "-c", run, "serve", str(folder), "--port", "0", "--api-key-file", "key"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        last = None
        try:
            line = server.stdout.readline()
            assert line.startswith("tiny at http://127.0.0.1:"), line + server.stdout.read()
            url = line.split()[2]
            with httpx.Client(base_url=url, headers={"Authorization": "Bearer s3cret"}, timeout=60) as client:
                body = {"prompt": "abc", "max_tokens": 200, "temperature": 0, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as reply:
                    next(reply.iter_lines())
                wait = time.monotonic() + 30
                while client.get("/health").json()["running"] and time.monotonic() < wait:
                    time.sleep(0.05)
                assert client.get("/health").json()["running"] == 0
                assert client.post("/v1/completions", json={"prompt": "x"}).json()["usage"]["prompt_tokens"] == 1
                assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 401
                body |= {"n": 60, "max_tokens": 240}  # minutes of it
                with client.stream("POST", "/v1/completions", json=body) as reply:
                    lines = reply.iter_lines()
                    next(lines)
                    server.send_signal(signal.SIGINT)
                    last = [line for line in lines if line][-2:]
                assert "the server is closing" in last[0] and last[1] == "data: [DONE]"
        finally:
            if last is None:
                server.kill()
            ended = threading.Timer(60, server.kill)
            ended.start()
            rest = server.stdout.read()
            ended.cancel()
        assert server.wait() == 130 and "s3cret" not in rest, rest
        assert rest.splitlines() == ["stopped by SIGINT; the server is closed"]


def talked(model, *lines, most=6, seed=0, tokenizer=None):
    """(answers, notes) of a conversation."""
    given, said, notes = iter(lines), [], []

    def read():
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    chat(model, tokenizer or byte_tokenizer(), Sampling(0, seed=seed), most, read, said.append, notes.append)
    return "".join(said).split("\n")[:-1], notes


def test_a_conversation_has_a_history_that_can_be_forgotten():
    model = tiny(time=ut.T2MLR(1, 2))
    first, second, again = talked(model, "Hello", "Hello", "/reset", "", "Hello")[0]
    assert first == again
    tokenizer = byte_tokenizer()
    told = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    alone = tokenizer.apply_chat_template([*told, told[0]], add_generation_prompt=True, tokenize=False)
    from undertow.evaluation.samples import sample

    assert second == sample(model, tokenizer, alone, 6, temperature=0)


def test_a_line_that_is_no_text_is_said_and_the_conversation_goes_on():
    answers, notes = talked(tiny(), "caf\udce9", "Hello")
    assert notes[1] == "that is not UTF-8" and answers == talked(tiny(), "Hello")[0]


def test_a_plain_model_is_served_as_it_is(tmp_path, capsys):
    """What `save_pretrained` of Hugging Face's own class wrote: wrapped without methods, its text is its own."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=257,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([byte_tokenizer()("Hello")["input_ids"]])
    text = byte_tokenizer().decode(plain.generate(ids, max_new_tokens=6, do_sample=False)[0, 5:])
    loaded = load(tmp_path, "cpu")
    torch.testing.assert_close(loaded.model(ids).logits, plain(ids).logits)
    app = build(loaded.model, loaded.tokenizer, Limits(), "plain")
    got = completed(TestClient(app), prompt="Hello", max_tokens=6, temperature=0)
    app.state.engine.close()
    assert got["choices"][0]["text"] == text
    options = ("--temperature", 0, "--max-new-tokens", 6, "--device", "cpu")
    assert call(capsys, "generate", tmp_path, "Hello", *options)[1] == f"Hello{text}\n"
    assert call(capsys, "check", tmp_path, "--device", "cpu")[0] == 0
    (tmp_path / "tokenizer.json").unlink()
    status, _, err = call(capsys, "serve", tmp_path, "--port", 0)
    assert status == 2 and f"{tmp_path}: cannot be loaded" in err and err.count("\n") == 1


def test_commands_of_a_conversation():
    model = tiny()
    answers, notes = talked(model, "/help", "/quit", "never read")
    assert answers == [] and notes[1].startswith("/help: no such command; /reset forgets")


def test_a_conversation_that_grows_too_long_forgets_its_beginning():
    model = tiny(positions=64)
    answers, notes = talked(model, "x" * 20, "y" * 20, "z" * 80, "w" * 20)
    assert len(answers) == 3
    assert "its first 2 messages are forgotten" in notes[1] and "leaves no room" in notes[2]


def test_generate_without_a_prompt(capsys, folder, monkeypatch):
    status, _, err = call(capsys, "generate", folder)
    assert status == 2 and err == "error: Missing argument 'PROMPT': a conversation needs a terminal\n"
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("undertow_cli.generate.out.input", lambda prompt: next(lines))
    status, said, err = call(capsys, "generate", folder, "--temperature", 0, "--max-new-tokens", 6, "--device", "cpu")
    assert status == 0, err
    assert "/reset forgets the conversation" in said
    (answer,), _ = talked(tiny(time=ut.T2MLR(1, 2)).float(), "Hello")
    assert answer.strip() in said
    cold = [
        call(capsys, "generate", folder, "Hello", "--temperature", t, "--device", "cpu") for t in (0, 1e-310, 1e-40)
    ]
    assert {status for status, *_ in cold} == {0} and cold[0][1] == cold[1][1] == cold[2][1]
