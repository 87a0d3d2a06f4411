"""What clients send and what they get, in the form of OpenAI's API (the part of it that is served)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=1 << 20)]
Token = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


class Sent(BaseModel):
    """What a client sends: unknown fields are refused, since leaving one out would change the answer unseen."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Sent):
    include_usage: bool = Field(False, description="Send the counts of tokens in one more event before the end.")


class Sampled(Sent):
    """What both kinds of completion take."""

    model: str | None = Field(None, description="The served model's name (see /v1/models); may be left out.")
    max_tokens: int | None = Field(None, ge=1, le=1 << 30, description="New tokens at most.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, ge=0, le=1, description="Sample among the likeliest tokens of this probability.")
    top_k: int = Field(0, ge=0, le=1 << 30, description="Sample among this many likeliest tokens; 0: all.")
    seed: int | None = Field(None, ge=-(1 << 62), le=1 << 62, description="The same seed gives the same text.")
    n: int = Field(1, ge=1, le=128, description="Texts for every prompt.")
    stop: Annotated[str, Field(min_length=1)] | Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=4)
    ] | None = Field(None, description="Texts that end the writing; not part of it.")  # fmt: skip
    stream: bool = Field(False, description="Send the text piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    presence_penalty: float = Field(0.0, ge=0, le=0, description="Only 0 is served.")
    frequency_penalty: float = Field(0.0, ge=0, le=0, description="Only 0 is served.")


class CompletionRequest(Sampled):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    ) = Field(description="A text, token ids, or a list of either.")


class TextPart(Sent):
    type: Literal["text"]
    text: Text


class Message(Sent):
    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = Field(None, description="Ignored.")

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30, description="Another name of max_tokens.")


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
