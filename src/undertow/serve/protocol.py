"""What clients send and what they get, in the form of OpenAI's API (the part of it that is served)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema, to_json

Text = Annotated[str, Field(max_length=1 << 20)]
Token = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Stop = Annotated[str, Field(min_length=1)]


class Only:
    """Of a field of OpenAI's that is not served: the values that ask for nothing (beside null)."""

    def __init__(self, *values: Any):
        self.values = values

    def __get_pydantic_core_schema__(self, source, handler):
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema, handler):
        return {"enum": [None, *self.values]}

    def _checked(self, value: Any) -> Any:
        if to_json(value) not in map(to_json, self.values):  # as JSON: there False is not 0
            allowed = ", ".join([*(to_json(allowed).decode() for allowed in self.values), "null"])
            raise PydanticCustomError("not_served", "Is not served; allowed are {allowed}", {"allowed": allowed})
        return value


class Sent(BaseModel):
    """What a client sends: unknown fields are refused, since leaving one out would change the answer unseen.

    Null asks for nothing: it is taken as a field that was left out, known or not.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nulls_left_out(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in sent.items() if value is not None or name in needed}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema, handler):
        made = handler.resolve_ref_schema(handler(schema))
        for name, field in made["properties"].items():
            if name not in made.get("required", ()) and None not in field.get("enum", ()):
                made["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return made | {"additionalProperties": {"type": "null"}}


class StreamOptions(Sent):
    include_usage: bool = Field(False, description="Send the counts of tokens in one more event before the end.")
    include_obfuscation: bool = Field(False, description="Ignored.")


def _how_many(value: Any) -> str | None:
    """Which form of `stop` or of a message's content a value has."""
    return "one" if isinstance(value, str) else "several" if isinstance(value, list) else None


class Sampled(Sent):
    """What both kinds of completion take."""

    model: str | None = Field(None, description="The served model's name (see /v1/models); may be left out.")
    max_tokens: int | None = Field(None, ge=1, le=1 << 30, description="New tokens at most.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, ge=0, le=1, description="Sample among the likeliest tokens of this probability.")
    top_k: int = Field(0, ge=0, le=1 << 30, description="Sample among this many likeliest tokens; 0: all.")
    seed: int | None = Field(None, ge=-(1 << 62), le=1 << 62, description="The same seed gives the same text.")
    n: int = Field(1, ge=1, le=128, description="Texts for every prompt.")
    stop: (
        Annotated[
            Annotated[Stop, Tag("one")] | Annotated[list[Stop], Field(max_length=4), Tag("several")],
            Discriminator(_how_many, "stop", "Must be a text or a list of up to 4 texts"),
        ]
        | None
    ) = Field(None, description="Texts that end the writing, special tokens among them; not part of it.")
    stream: bool = Field(False, description="Send the text piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    presence_penalty: Annotated[Any, Only(0, 0.0)] = None
    frequency_penalty: Annotated[Any, Only(0, 0.0)] = None
    logit_bias: Annotated[Any, Only({})] = None


def _prompt_is(value: Any) -> str | None:
    """Which form a prompt has: its first part says."""
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    forms = {str: "texts", int: "tokens", list: "lists"}
    return next((form for kind, form in forms.items() if value and isinstance(value[0], kind)), None)


class CompletionRequest(Sampled):
    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], Field(min_length=1, max_length=128), Tag("texts")]
        | Annotated[list[Token], Field(min_length=1), Tag("tokens")]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=128), Tag("lists")
        ],
        Discriminator(_prompt_is, "prompt", "Must be a text, token ids, or a list of either, and not empty"),
    ] = Field(description="A text, token ids, or a list of either.")
    best_of: int | None = Field(None, ge=1, description="As many as `n`: all that are written are sent.")
    echo: Annotated[Any, Only(False)] = None
    logprobs: Annotated[Any, Only()] = None
    suffix: Annotated[Any, Only("")] = None

    @field_validator("best_of")
    @classmethod
    def _all_are_sent(cls, value: int, info: ValidationInfo) -> int:
        if value != info.data.get("n", value):
            raise PydanticCustomError("best_of", "Must be n: all texts that are written are sent")
        return value


class TextPart(Sent):
    type: Annotated[Any, Only("text")]
    text: Text
    prompt_cache_breakpoint: Any = Field(None, description="Ignored.")


class Message(Sent):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="A developer speaks as the system.")
    content: (
        Annotated[
            Annotated[Text, Tag("one")] | Annotated[list[TextPart], Tag("several")],
            Discriminator(_how_many, "content", "Must be a text or a list of parts of text"),
        ]
        | None
    ) = Field(None, validate_default=True, description="Null (of an assistant alone): an empty text.")
    name: str | None = Field(None, description="Ignored.")
    # What an answer of OpenAI's holds when it is put back into the conversation.
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None

    @field_validator("content")
    @classmethod
    def _only_answers_are_empty(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("content", "Must be a text or a list of parts of text")
        return value

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role  # templates know no developer
        parts = self.content or ""
        return {"role": role, "content": parts if isinstance(parts, str) else "".join(part.text for part in parts)}


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30, description="Another name of max_tokens.")
    metadata: Any = Field(None, description="Ignored.")
    prompt_cache_key: Any = Field(None, description="Ignored.")
    prompt_cache_options: Any = Field(None, description="Ignored.")
    prompt_cache_retention: Any = Field(None, description="Ignored.")
    safety_identifier: Any = Field(None, description="Ignored.")
    parallel_tool_calls: Any = Field(None, description="Ignored: there are no tools.")
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    logprobs: Annotated[Any, Only(False)] = None
    modalities: Annotated[Any, Only(["text"])] = None
    moderation: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Annotated[Any, Only(False)] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    tools: Annotated[Any, Only([])] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None


class LookRequest(Sent):
    """What the page asks for: one text, with what the model did inside at every token."""

    prompt: Text
    chat: bool = Field(False, description="Take the prompt as a user's message.")
    max_tokens: int = Field(64, ge=1, le=1 << 30)
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 30)
    seed: int | None = Field(None, ge=-(1 << 62), le=1 << 62)


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: Problem


class Card(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "undertow"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Card]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    running: int
    waiting: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
