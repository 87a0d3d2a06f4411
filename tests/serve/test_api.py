"""The endpoints on a tiny model: what they answer, what they refuse, and what they leave behind."""

import asyncio
import json
import logging
import time
from functools import partial

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from served import byte_tokenizer, chatted, completed, events, tiny

import undertow as ut
from undertow.serve import api, engine
from undertow.serve.engine import Limits

LIMITS = Limits(max_tokens=24, max_queue=4, batch=3, max_watched=20)
LONG = "The current that runs beneath the surface"


@pytest.fixture(scope="module")
def app():
    made = api.build(tiny(time=ut.T2MLR(1, 2)), byte_tokenizer(), LIMITS, "tiny")
    yield made
    made.state.engine.close()


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app)


def reference(app, prompt: str, tokens: int) -> list[int]:
    """Hugging Face's own greedy loop."""
    model = app.state.engine.model
    ids = torch.tensor([byte_tokenizer()(prompt)["input_ids"]])
    return model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()


def test_greedy_is_the_models_own_generation(app, client):
    tokenizer, ids = byte_tokenizer(), reference(app, LONG, 16)
    got = completed(client, prompt=LONG, max_tokens=16, temperature=0)
    assert got["object"] == "text_completion" and got["model"] == "tiny"
    assert got["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert got["choices"][0]["finish_reason"] == ("stop" if ids[-1] == 0 else "length")
    read = len(LONG.encode())
    assert got["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": len(ids),
        "total_tokens": read + len(ids),
    }
    given = byte_tokenizer()(LONG)["input_ids"]
    assert completed(client, prompt=given, max_tokens=16, temperature=0)["choices"] == got["choices"]


@pytest.mark.parametrize("temperature", [2.2250738585e-313, 1e-310, 1e-45, 1e-31, 1e-12])
def test_next_to_no_temperature_is_none(client, temperature):
    """Logits divided by such numbers would overflow."""
    cold = completed(client, prompt=LONG, max_tokens=6, temperature=temperature, top_p=0.25, top_k=97, seed=0)
    assert cold["choices"] == completed(client, prompt=LONG, max_tokens=6, temperature=0)["choices"]


def test_the_end_token_ends_a_text(app, client, monkeypatch):
    """It counts, since it was written, but nobody sees it."""
    ids = reference(app, LONG, 12)
    n = ids.index(ids[6])
    monkeypatch.setattr(app.state.engine, "ends", frozenset({ids[6]}))
    got = completed(client, prompt=LONG, max_tokens=12, temperature=0)
    assert got["choices"][0]["text"] == byte_tokenizer().decode(ids[:n])
    assert got["choices"][0]["finish_reason"] == "stop" and got["usage"]["completion_tokens"] == n + 1


def test_stop_strings(client):
    whole = completed(client, prompt="a", max_tokens=20, seed=1)["choices"][0]["text"]
    stop = whole[6:8]
    got = completed(client, prompt="a", max_tokens=20, seed=1, stop=[stop, "never said"])
    assert got["choices"][0] == {
        "index": 0, "text": whole[: whole.index(stop)], "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert got["usage"]["completion_tokens"] < 20


def test_several_texts_of_several_prompts(client):
    got = completed(client, prompt=["one", "another"], n=2, max_tokens=6, seed=5)
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in got["choices"]]
    assert texts[0] != texts[1] and texts[2] != texts[3]
    for i, (prompt, seed) in enumerate((("one", 5), ("one", 6), ("another", 5), ("another", 6))):
        alone = completed(client, prompt=prompt, max_tokens=6, seed=seed)
        assert alone["choices"][0]["text"] == texts[i]


def test_requests_at_once_say_what_they_say_alone(app, client):
    """Different settings, lengths and seeds in one batch; the batch takes fewer steps than the texts have tokens."""
    bodies = [
        {"prompt": LONG, "max_tokens": 22, "temperature": 0},
        {"prompt": "a", "max_tokens": 18, "seed": 1, "temperature": 1.3},
        {"prompt": "something else", "max_tokens": 20, "seed": 2, "top_p": 0.8},
        {"prompt": "b" * 30, "max_tokens": 16, "seed": 3, "top_k": 7},
    ]
    alone = [completed(client, **body)["choices"] for body in bodies]
    before = app.state.engine.steps

    async def together():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as several:
            return await asyncio.gather(*(several.post("/v1/completions", json=body) for body in bodies))

    replies = [reply.json() for reply in asyncio.run(together())]
    assert [reply["choices"] for reply in replies] == alone
    assert app.state.engine.steps - before < sum(reply["usage"]["completion_tokens"] for reply in replies) * 0.7


def test_a_stream_is_the_same_text(client):
    body = {"prompt": LONG, "max_tokens": 14, "seed": 4, "n": 2}
    got = completed(client, **body)
    found = events(client, **body, stream=True, stream_options={"include_usage": True})
    texts, ends = ["", ""], [None, None]
    for event in found[:-1]:
        assert event["object"] == "text_completion" and event["id"] == found[0]["id"]
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert [(c["text"], c["finish_reason"]) for c in got["choices"]] == list(zip(texts, ends, strict=True))
    assert found[-1]["choices"] == [] and found[-1]["usage"] == got["usage"]
    assert len(found) > 6 and not any("usage" in event for event in events(client, **body, stream=True))


def test_chat(client):
    exchange = (("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi."), ("user", "Go on."))
    got = chatted(client, *exchange, max_tokens=12, seed=0)
    rendered = "<system>Be brief.\n<user>Hello!\n<assistant>Hi.\n<user>Go on.\n<assistant>"
    same = completed(client, prompt=rendered, max_tokens=12, seed=0)
    (choice,) = got["choices"]
    assert got["object"] == "chat.completion" and got["usage"] == same["usage"]
    assert choice["message"] == {"role": "assistant", "content": same["choices"][0]["text"]}

    parts = [{"type": "text", "text": "Go "}, {"type": "text", "text": "on."}]
    assert chatted(client, *exchange[:-1], ("user", parts), max_tokens=12, seed=0)["choices"] == got["choices"]
    assert len(chatted(client, ("user", "x"), seed=7)["choices"][0]["message"]["content"]) > 12  # no limit was asked

    said = [{"role": role, "content": text} for role, text in exchange]
    found = events(client, "chat/completions", messages=said, max_completion_tokens=12, seed=0, stream=True)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert found[0]["object"] == "chat.completion.chunk"
    deltas = [event["choices"][0]["delta"] for event in found]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    assert not any("role" in delta for delta in deltas[1:])
    assert found[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_a_special_token_as_stop_string(client, app, monkeypatch):
    """Written as a text and hidden in the answer: streamed or not, in both endpoints, in every row."""
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    often = tokenizer("ab世" + special[0] * 3 + special[1] * 2)["input_ids"]
    monkeypatch.setattr(app.state.engine, "tokenizer", tokenizer)
    monkeypatch.setattr(app.state.engine.model, "forward", partial(_forward, app.state.engine.model.forward))
    monkeypatch.setattr(
        engine, "choose", lambda logits, how, source: often[int(torch.randint(len(often), (), generator=source))]
    )
    body, stop = {"n": 4, "max_tokens": 12, "seed": 2}, ["<|im_end|>", "<|im_start|><|im_start|>"]
    said = [{"role": "user", "content": "hi"}]
    for path, given in (("completions", {"prompt": "hi"}), ("chat/completions", {"messages": said})):
        whole, got = (completed(client, path=path, **given, **body, **more) for more in ({}, {"stop": stop}))
        assert got["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
        assert all(_text(b).startswith(_text(a)) for a, b in zip(got["choices"], whole["choices"], strict=True))
        assert {choice["finish_reason"] for choice in got["choices"]} == {"stop"}
        parts = dict.fromkeys(range(4), "")
        for event in events(client, path, **given, **body, stop=stop, stream=True):
            parts[event["choices"][0]["index"]] += _text(event["choices"][0])
        assert [_text(choice) for choice in got["choices"]] == list(parts.values())


def _forward(forward, input_ids, **arguments):
    return forward(input_ids % 257, **arguments)  # the tokens that are added are not in the model


def _text(choice) -> str:
    said = choice.get("message", choice.get("delta", choice))
    return said.get("content", said.get("text", ""))


def test_health_models_and_page(client):
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and completed(client, model="tiny", prompt="x", max_tokens=1)
    page = client.get("/")
    assert page.status_code == 200 and "<title>undertow" in page.text
    assert (
        "http://" not in page.text.replace("http://www.w3.org", "") and "https://" not in page.text
    )  # nothing is fetched


def test_look_streams_what_the_model_did(client):
    body = {"prompt": "abc", "max_tokens": 5, "seed": 3, "temperature": 1.0}
    legend, *tokens = events(client, "look", **body)
    assert legend["model"] == "tiny"
    assert legend["legend"]["visits"] == [f"layer {i}" for i in range(4)] and legend["legend"]["memories"] == [
        "layer 2"
    ]
    assert [token["token"] for token in tokens[:3]] == ["a", "b", "c"] and tokens[0]["predicted"] is None
    assert [token["prompt"] for token in tokens] == [True] * 3 + [False] * (len(tokens) - 3)
    same = completed(client, **body)["choices"][0]
    assert "".join(token["text"] for token in tokens) == same["text"]
    assert tokens[-1]["finish"] == same["finish_reason"] and tokens[-1]["state"] is None
    for token in tokens[1:-1]:
        assert len(token["predicted"]) == 4 and len(token["state"]["edges"]) == 1
        assert set(token["state"]["edges"][0]["gates"]) == {"m", "x"} and token["state"]["memories"][0]["norm"] > 0


BAD = {
    "no prompt": ({}, 400, "prompt"),
    "null": ({"prompt": None}, 400, "prompt: Must be a text, token ids, or a list of either"),
    "no part": ({"prompt": []}, 400, "prompt: Must be a text, token ids, or a list of either"),
    "a part of another kind": ({"prompt": ["x", 1]}, 400, "prompt.1: Input should be a valid string"),
    "an unknown field": ({"prompt": "x", "logit_bia": {}}, 400, "logit_bia: Unknown field"),
    "what is not served": (
        {"prompt": "x", "logit_bias": {"5": 1}},
        400,
        "logit_bias: Is not served; allowed are {}, null",
    ),
    "log-probabilities": ({"prompt": "x", "logprobs": 0}, 400, "logprobs: Is not served; allowed are null"),
    "no number": ({"prompt": "x", "presence_penalty": False}, 400, "presence_penalty: Is not served; allowed are 0,"),
    "the best of several": ({"prompt": "x", "n": 2, "best_of": 3}, 400, "best_of: Must be n"),
    "many stop strings": ({"prompt": "x", "stop": list("abcde")}, 400, "stop: List should have at most 4 items"),
    "no stop string": ({"prompt": "x", "stop": 5}, 400, "stop: Must be a text or a list of up to 4 texts"),
    "a text for a number": ({"prompt": "x", "temperature": "1"}, 400, "temperature"),
    "too hot": ({"prompt": "x", "temperature": 2.5}, 400, "temperature"),
    "no token": ({"prompt": ""}, 400, "at least one token"),
    "half a character": ({"prompt": "\ud800"}, 400, "prompt: Must be Unicode"),
    "an unknown token": ({"prompt": [1, 257]}, 400, "token 257: ids are 0..256"),
    "max_tokens": ({"prompt": "x", "max_tokens": 25}, 400, "max_tokens=25: at most 24"),
    "more texts than may wait": ({"prompt": "x", "n": 5}, 400, "5 texts in one request; at most 4"),
    "the prompt fills it": ({"prompt": "x" * 256}, 400, "256 tokens; texts may have 256"),
    "no room": ({"prompt": "x" * 240, "max_tokens": 17}, 400, "max_tokens=17 after a prompt of 240"),
    "another model": ({"prompt": "x", "model": "gpt"}, 404, "'tiny' only"),
    "options of a stream": ({"prompt": "x", "stream_options": {}}, 400, "stream=true"),
    "too long to read": ({"prompt": "x" * (1 << 20)}, 413, "longer than 1048576 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_served_is_said_in_openais_form(client, case):
    body, status, message = BAD[case]
    reply = client.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"]


def test_other_refusals(client):
    said = {"Content-Type": "application/json"}
    for content, headers, why in (
        ("{", said, "the body is not JSON"),
        (b'{"prompt": "caf\xe9"}', said, "error parsing the body"),
        ("[]", said, "the body must be an object"),
        ('{"prompt": "x"}', {"Content-Type": "text/plain"}, "sent with Content-Type: application/json"),
        ("{}", said, "prompt: Field required"),
    ):
        reply = client.post("/v1/completions", content=content, headers=headers)
        assert reply.status_code == 400 and why in reply.json()["error"]["message"], reply.text
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/completions").status_code == 405 and client.get("/v1/completions").json()["error"]
    for path in ("/nothing", "/v1/responses", "/v1/embeddings"):
        reply = client.post(path, json={})
        assert reply.status_code == 404 and f"{path}: not found; there are /v1/chat/completions" in reply.text
    got = chatted(client, ("user", "x"), ("system", "y"), status=400)
    assert "the system speaks first" in got["error"]["message"]
    assert "say different things" in chatted(
        client, ("user", "x"), status=400, max_tokens=1, max_completion_tokens=2
    )["error"]["message"]  # fmt: skip
    assert completed(client, 400, "look", prompt="x" * 21)["error"]["code"] == "prompt_too_long"


def test_a_queue_that_is_full(app, client):
    """Three run, four wait: the next is told to come again."""
    running = app.state.engine
    slow = [engine.Row([5] * 9, 24, engine.Sampling(0), lambda piece: time.sleep(0.05)) for _ in range(3)]
    running.submit(slow)
    wait_for(lambda: running.busy == 3)
    more = [engine.Row([5], 1, engine.Sampling(0), lambda piece: None) for _ in range(4)]
    running.submit(more)
    reply = client.post("/v1/completions", json={"prompt": "x"})
    assert reply.status_code == 429 and reply.json()["error"]["code"] == "queue_full"
    assert reply.headers["retry-after"] == "1"
    for row in (*slow, *more):
        row.cancelled = True
    wait_for(lambda: running.busy == 0)
    assert completed(client, prompt="x", max_tokens=1) and all(row.tokens < 24 for row in slow)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "nothing happened for 30 seconds"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_costing(app, stream):
    """A hand-made connection that closes after the body: the row ends long before its tokens are written."""
    running, body = app.state.engine, {"prompt": "x", "max_tokens": 24, "n": 1, "temperature": 0, "stream": stream}
    sent, rows = [], []
    submit = running.submit

    def later(deliver, piece):
        time.sleep(0.05)
        deliver(piece)

    def slowly(some):
        rows.extend(some)
        for row in some:
            row.deliver = partial(later, row.deliver)
        submit(some)

    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "client": None, "server": ("test", 80), "root_path": "",
    }  # fmt: skip
    running.submit = slowly
    try:
        asyncio.run(app(scope, receive, send))
    finally:
        del running.submit
    wait_for(lambda: running.busy == 0)
    assert rows[0].cancelled and rows[0].tokens < 20


def test_a_model_that_fails_is_said_and_the_next_request_is_served(app, client, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "prefill", fail)
        got = completed(client, 500, prompt="x")
        assert got["error"]["type"] == "server_error" and "RuntimeError" in got["error"]["message"]
        assert "error" in events(client, prompt="x", stream=True)[-1]
    assert "out of memory" in caplog.text
    assert completed(client, prompt="x", max_tokens=2)


def test_without_a_chat_template():
    made = api.build(tiny(), byte_tokenizer(None), LIMITS, "plain")
    got = chatted(TestClient(made), ("user", "x"), status=400)
    assert got["error"]["message"] == "plain has no chat template: use /v1/completions"
    made.state.engine.close()
    assert completed(TestClient(made), 429, prompt="x")  # closed: it takes nothing on


def test_a_key_is_asked_for_and_never_shown(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    key = "s3cret-key-of-the-test"
    made = api.build(tiny(), byte_tokenizer(), LIMITS, "tiny", key=key, hosts=("testserver",))
    client = TestClient(made)
    for headers in ({}, {"Authorization": f"Bearer {key}x"}, {"Authorization": key}, {"Authorization": "Bearer é"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        for path in ("/v1/completions", "/v1/look", "/v1/nothing"):
            reply = client.post(path, json={"prompt": 1}, headers=encoded)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    right = {"Authorization": f"Bearer {key}"}
    reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=right)
    assert reply.status_code == 200
    wrong = client.post("/v1/completions", json={"prompt": 1}, headers=right)
    assert client.get("/health").status_code == 200 and client.get("/").status_code == 200  # no secrets there
    schema = client.get("/openapi.json").json()
    assert schema["paths"]["/v1/look"]["post"]["security"] == [{"key": []}]
    assert "security" not in schema["paths"]["/health"]["get"]
    said = [caplog.text, *capfd.readouterr(), reply.text, wrong.text, json.dumps(schema)]
    assert not any(key in text for text in said)
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"Host": "testserver:8000"}).status_code == 200
    made.state.engine.close()


def test_the_engine_closes_with_the_application():
    made = api.build(tiny(), byte_tokenizer(), LIMITS, "tiny")
    with TestClient(made) as client:
        assert completed(client, prompt="x", max_tokens=2)
    assert not made.state.engine._thread.is_alive()


def test_limits_are_checked():
    with pytest.raises(ValueError, match="batch=0: must be at least 1"):
        Limits(batch=0)
