"""What the server takes: fields that ask for nothing, messages as OpenAI's client sends them, what is not served."""

import json

import pytest
from fastapi.testclient import TestClient
from served import byte_tokenizer, chatted, completed, events, tiny

import undertow as ut
from undertow.serve import api
from undertow.serve.engine import Limits
from undertow.serve.protocol import ChatRequest, CompletionRequest


@pytest.fixture(scope="module")
def client():
    app = api.build(tiny(time=ut.T2MLR(1, 2)), byte_tokenizer(), Limits(max_tokens=24), "tiny")
    yield TestClient(app)
    app.state.engine.close()


NOTHING = {  # what asks for nothing, beside null: of both, of a completion, of a chat
    "both": {
        "n": [1], "stop": [[]], "stream": [False], "presence_penalty": [0, 0.0], "frequency_penalty": [0],
        "user": ["me"], "logit_bias": [{}], "temperature": [], "top_p": [], "seed": [], "model": ["tiny"],
        "stream_options": [],
    },
    "completions": {"best_of": [1], "echo": [False], "suffix": [""], "logprobs": []},
    "chat": {
        "max_completion_tokens": [], "audio": [], "function_call": ["none", "auto"], "functions": [[]],
        "logprobs": [False], "metadata": [{"a": "b"}], "modalities": [["text"]], "moderation": [],
        "parallel_tool_calls": [True, False], "prediction": [], "prompt_cache_key": ["x"], "prompt_cache_options": [{}],
        "prompt_cache_retention": ["24h"], "reasoning_effort": ["none"], "response_format": [{"type": "text"}],
        "safety_identifier": ["x"], "service_tier": ["auto"], "store": [False], "tool_choice": ["none", "auto"],
        "tools": [[]], "top_logprobs": [0], "verbosity": ["medium"], "web_search_options": [], "of_tomorrow": [],
    },
}  # fmt: skip


def test_fields_that_ask_for_nothing(client):
    """All fields of OpenAI's own client, as null and as what is the same: the answer is that without them."""
    said = [{"role": "user", "content": "hi"}]
    for kind, path, form, given in (
        ("completions", "completions", CompletionRequest, {"prompt": "hi"}),
        ("chat", "chat/completions", ChatRequest, {"messages": said}),
    ):
        fields = NOTHING["both"] | NOTHING[kind]
        for name, values in fields.items():
            for value in (None, *values):
                form.model_validate({**given, name: value})
        plain = {"path": path, **given, "max_tokens": 3}
        want = completed(client, **plain, seed=0)["choices"]
        assert completed(client, **{**dict.fromkeys(fields), **plain, "seed": 0})["choices"] == want
        same = {name: values[0] for name, values in fields.items() if values}
        assert completed(client, **plain, **same, seed=0)["choices"] == want
        assert completed(client, **{**plain, "max_tokens": None, "stop": "x"})
    assert events(client, prompt="hi", max_tokens=2, stream=True, stream_options={"include_usage": None})


def test_an_answer_put_back_into_the_conversation(client):
    """With all that OpenAI's client makes of it; a developer speaks as the system."""
    hello, again = {"role": "user", "content": "hi"}, {"role": "user", "content": "again", "name": None}
    answer = {
        "content": "good day", "refusal": None, "role": "assistant", "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    how = {"path": "chat/completions", "max_tokens": 6, "seed": 1}
    plain = {"role": "assistant", "content": "good day"}
    want = completed(client, messages=[hello, plain, again], **how)["choices"]
    for said in (answer, answer | {"annotations": [], "tool_calls": []}, plain | {"reasoning_content": None}):
        assert completed(client, messages=[hello, said, again], **how)["choices"] == want
    nothing = (answer | {"content": None}, {"role": "assistant"}, {"role": "assistant", "content": ""})
    empty = [completed(client, messages=[hello, said, again], **how)["choices"] for said in nothing]
    assert empty[0] == empty[1] == empty[2]
    part = {"type": "text", "text": "Be brief.", "prompt_cache_breakpoint": {"mode": "explicit"}}
    asked = (("system", "Be brief."), ("developer", "Be brief."), ("developer", [part]))
    rules = [{"role": role, "content": content} for role, content in asked]
    obeyed = [completed(client, messages=[rule, hello], **how)["choices"] for rule in rules]
    assert obeyed[0] == obeyed[1] == obeyed[2]


@pytest.mark.parametrize(
    ("message", "field", "why"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages.0.role", "'assistant'"),
        ({"role": "user", "content": None}, "messages.0.content", "Must be a text or a list of parts"),
        ({"role": "user"}, "messages.0.content", "Must be a text or a list of parts"),
        ({"role": "user", "content": 5}, "messages.0.content", "Must be a text or a list of parts"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0.type",
         'Is not served; allowed are "text"'),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages.0.refusal", "Is not served"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls", "Is not served"),
        ({"role": "user", "content": "x", "colour": "red"}, "messages.0.colour", "Unknown field"),
        ({"role": "user", "content": "\ud800"}, "messages.0.content", "Must be Unicode"),
    ],
)  # fmt: skip
def test_what_a_message_may_not_hold(client, message, field, why):
    body = json.dumps({"messages": [message]})
    reply = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == field
    assert error["message"].startswith(f"{field}: ") and why in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"logprobs": True},
        {"top_logprobs": 2}, {"modalities": ["text", "audio"]}, {"tool_choice": "required"}, {"store": True},
        {"functions": [{}]}, {"reasoning_effort": "high"}, {"service_tier": "flex"}, {"store": 0},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_a_chat_does_not_serve(client, field):
    error = chatted(client, ("user", "x"), status=400, **field)["error"]
    (name,) = field
    assert error["param"] == name and error["message"].startswith(f"{name}: Is not served; allowed are")
