"""The endpoints: OpenAI's completions and chat completions, the page, and what the page asks for."""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from undertow.data.format import TextFormat, Tokens
from undertow.serve import protocol as p
from undertow.serve.decode import Sampling
from undertow.serve.engine import Engine, Full, Limits, Piece, Row
from undertow.serve.guard import Guard, Refused

DEFAULT_TOKENS = 16  # of a completion that does not say (OpenAI's default); a chat goes up to the server's limit
LOOK_AGAIN = 0.25  # seconds between two looks whether a client is still there
PAGE = Path(__file__).with_name("page.html")
STREAM = "text/event-stream"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": p.ErrorReply, "description": text}
    for status, text in {
        400: "The request cannot be served as it is.",
        401: "The API key is missing or wrong.",
        404: "No such model.",
        413: "The request is too long.",
        429: "Too many texts are waiting.",
        500: "The model failed.",
    }.items()
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED = {200: {"content": {STREAM: {"schema": EVENT}}}}  # the schema is that of each event


def build(
    model, tokenizer, limits: Limits, name: str, key: str | None = None, hosts: Collection[str] | None = None
) -> FastAPI:
    """The application; `app.state.engine` is its engine, closed when the application shuts down.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        tokenizer: a `TextFormat`, or a tokenizer that carries one (else: see `TextFormat.of`): how prompts are read,
            and where the memory acts.
        name: what the model is called in `/v1/models`.
        key: what clients must send (None: nothing).
        hosts: names that requests may be sent to (None: any).
    """
    engine = Engine(model, copy.deepcopy(tokenizer), limits)  # fast tokenizers do not like two threads

    @asynccontextmanager
    async def life(app: FastAPI):
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="undertow", version="1", lifespan=life, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.add_middleware(Guard, key=key, hosts=hosts)
    app.add_exception_handler(Refused, lambda request, refused: refused.response())  # type: ignore[union-attr,arg-type,return-value]
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, lambda request, error: Refused(500, type(error).__name__).response())
    server = Server(engine, tokenizer, name)
    v1: dict[str, Any] = {"responses": ERRORS}
    streams: dict[str, Any] = {"responses": {**ERRORS, **STREAMED}}
    app.get("/", response_class=HTMLResponse, include_in_schema=False)(server.page)
    app.get("/health", response_model=p.Health)(server.health)
    app.get("/v1/models", response_model=p.Models, **v1)(server.models)
    app.post("/v1/completions", response_model=p.Completion, **streams)(server.completions)
    app.post("/v1/chat/completions", response_model=p.ChatCompletion, **streams)(server.chat)
    app.post("/v1/look", response_class=StreamingResponse, **streams)(server.look)
    schema = app.openapi

    def openapi() -> dict:
        made = schema()
        for path, operations in made["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # what is invalid is a 400 here, as with OpenAI
                if key is not None and path.startswith("/v1"):
                    operation["security"] = [{"key": []}]
        if key is not None:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return made

    app.openapi = openapi  # type: ignore[method-assign]
    return app


async def _invalid(request: Request, error: RequestValidationError):
    """The first thing that is wrong, without the value: it may be anything."""
    first, where, inside = error.errors()[0], list[str](), error.body
    if first["type"] == "json_invalid":
        return Refused(400, "the body is not JSON", "invalid_value").response()
    if not isinstance(inside, dict):
        return Refused(400, "the body must be an object, sent with Content-Type: application/json").response()
    for part in first["loc"][1:]:  # of the parts, those that lead into the body: others are pydantic's own
        held = part in inside if isinstance(inside, dict) else isinstance(inside, list) and part in range(len(inside))
        if held or isinstance(inside, dict):  # the second: what is missing
            where.append(str(part))
            inside = inside[part] if held else None
    why = {"extra_forbidden": "Unknown field", "string_unicode": "Must be Unicode"}.get(first["type"], first["msg"])
    place = ".".join(where)
    return Refused(400, f"{place}: {why}", "invalid_value", place).response()


async def _http(request: Request, error: HTTPException):
    said = str(error.detail)
    if error.status_code == 404:
        paths = sorted(route.path for route in request.app.routes if route.path.startswith("/v1/"))
        said = f"{request.url.path}: not found; there are {', '.join(paths)}"
    return Refused(error.status_code, said, headers=error.headers).response()


class Writing:
    """The rows of one request, and what they hand on, in the event loop."""

    def __init__(self, engine: Engine, rows: Sequence[dict[str, Any]]):
        self.id, self.created = secrets.token_hex(12), int(time.time())
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliverer(i: int):
            def deliver(piece: Piece):
                with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(self.pieces.put_nowait, (i, piece))

            return deliver

        self.rows = [Row(**row, deliver=deliverer(i)) for i, row in enumerate(rows)]
        try:
            engine.submit(self.rows)
        except Full as full:
            raise Refused(429, str(full), "queue_full", headers={"Retry-After": "1"}) from None

    async def each(self, request: Request) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all rows as they come, until all are done. A client that goes away ends them at once.

        Raises:
            Refused: a row failed.
        """
        loop, left = asyncio.get_running_loop(), len(self.rows)
        again = loop.time() + LOOK_AGAIN
        try:
            while left:
                if loop.time() > again:
                    if await request.is_disconnected():
                        return
                    again = loop.time() + LOOK_AGAIN
                try:
                    i, piece = await asyncio.wait_for(self.pieces.get(), LOOK_AGAIN)
                except TimeoutError:
                    continue
                if piece.finish == "error":
                    raise Refused(500, f"the text could not be written: {piece.text}")
                left -= piece.finish is not None
                yield i, piece
        finally:
            for row in self.rows:
                row.cancelled = True

    def usage(self, counts: Sequence[int], prompts: int) -> p.Usage:
        return p.Usage(prompt_tokens=prompts, completion_tokens=sum(counts), total_tokens=prompts + sum(counts))


class Server:
    """What each endpoint does. `tokenizer` is for the event loop's thread alone."""

    def __init__(self, engine: Engine, tokenizer, name: str):
        self.engine, self.name, self.began = engine, name, int(time.time())
        self.form = TextFormat.of(tokenizer)

    async def page(self) -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def health(self) -> p.Health:
        return p.Health(running=self.engine.busy, waiting=self.engine.waiting)

    async def models(self) -> p.Models:
        return p.Models(data=[p.Card(id=self.name, created=self.began)])

    async def completions(self, request: Request, body: p.CompletionRequest):
        given: Any = body.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        prompts = [self._tokens(prompt) for prompt in (given if several else [given])]
        most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        writing = self._write(body, prompts, most, body.max_tokens is None, continues=True)
        read = sum(map(len, prompts))

        def choice(i: int, text: str, finish: str | None) -> dict:
            return {"index": i, "text": text, "logprobs": None, "finish_reason": finish}

        if body.stream:
            return self._stream(request, body, writing, "cmpl", "text_completion", read, choice)
        texts, ends, counts = await self._all(request, writing)
        return p.Completion(
            id=f"cmpl-{writing.id}",
            created=writing.created,
            model=self.name,
            choices=[p.Choice(**choice(i, *pair)) for i, pair in enumerate(zip(texts, ends, strict=True))],
            usage=writing.usage(counts, read),
        )

    async def chat(self, request: Request, body: p.ChatRequest):
        prompt = self._conversation([message.plain() for message in body.messages])
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise Refused(400, "max_tokens and max_completion_tokens say different things", param="max_tokens")
        asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        most = self.engine.limits.max_tokens if asked is None else asked
        writing = self._write(body, [prompt], most, asked is None, continues=False)
        if body.stream:
            begun = set[int]()

            def choice(i: int, text: str, finish: str | None) -> dict:
                first = {} if i in begun else {"role": "assistant"}
                begun.add(i)
                delta = {**first, "content": text} if text or first else {}
                return {"index": i, "delta": delta, "logprobs": None, "finish_reason": finish}

            return self._stream(request, body, writing, "chatcmpl", "chat.completion.chunk", len(prompt), choice)
        texts, ends, counts = await self._all(request, writing)
        return p.ChatCompletion(
            id=f"chatcmpl-{writing.id}",
            created=writing.created,
            model=self.name,
            choices=[
                p.ChatChoice(index=i, message=p.Answer(content=text), finish_reason=end)  # type: ignore[arg-type]
                for i, (text, end) in enumerate(zip(texts, ends, strict=True))
            ],
            usage=writing.usage(counts, len(prompt)),
        )

    async def look(self, request: Request, body: p.LookRequest):
        """One text, token by token: what each visit predicted, gates and norms (see `undertow.serve.look`)."""
        said = [{"role": "user", "content": body.prompt}]
        prompt = self._conversation(said) if body.chat else self._tokens(body.prompt)
        most = self.engine.limits.max_watched
        if len(prompt) > most:
            raise Refused(400, f"prompt: {len(prompt)} tokens; at most {most} can be watched", "prompt_too_long")
        how = Sampling(body.temperature, body.top_p, body.top_k, body.seed)
        length = self._length(len(prompt), body.max_tokens, False)
        row = {**self._given(prompt), "most": length, "how": how, "continues": not body.chat, "watched": True}
        writing = Writing(self.engine, [row])

        async def events() -> AsyncIterator[dict]:
            yield {"legend": self.engine.legend, "model": self.name}
            async for _, piece in writing.each(request):
                yield {"text": piece.text, "finish": piece.finish, **(piece.seen or {})}

        return _events(events())

    # ------------------------------------------------------------------ what the endpoints share

    def _given(self, prompt: Tokens) -> dict[str, Any]:
        """A row's prompt, and where the memory acts in it."""
        return {"prompt": prompt.ids, "memory": None if self.form.memory == "all" else prompt.memory}

    def _tokens(self, prompt: str | list[int]) -> Tokens:
        if isinstance(prompt, list):
            most = self.engine.model.config.get_text_config().vocab_size
            if max(prompt) >= most:
                raise Refused(400, f"prompt: token {max(prompt)}: ids are 0..{most - 1}", param="prompt")
            return self.form.given(prompt)
        tokens = self.form.begin(prompt)
        if not tokens.ids:
            raise Refused(400, "prompt: must hold at least one token", param="prompt")
        return tokens

    def _conversation(self, messages: list[dict[str, str]]) -> Tokens:
        if not self.form.has_template:
            say = f"{self.name} has no chat template: use /v1/completions"
            raise Refused(400, say, "no_chat_template")
        try:
            return self.form.conversation(messages)
        except TemplateError as error:
            raise Refused(400, f"messages: the chat template says: {error}", param="messages") from None

    def _length(self, prompt: int, most: int, default: bool) -> int:
        """New tokens at most. A default bends to what there is room for, a wish is refused."""
        limit, room = self.engine.limits.max_tokens, self.engine.longest - prompt
        if room < 1:
            say = f"the prompt has {prompt} tokens; texts may have {self.engine.longest}, answer included"
            raise Refused(400, say, "context_length_exceeded")
        if default:
            return min(most, limit, room)
        if most > limit:
            raise Refused(400, f"max_tokens={most}: at most {limit}", "invalid_value", "max_tokens")
        if most > room:
            say = f"max_tokens={most} after a prompt of {prompt}: texts may have {self.engine.longest} tokens in all"
            raise Refused(400, say, "context_length_exceeded", "max_tokens")
        return most

    def _write(self, body: p.Sampled, prompts: list[Tokens], most: int, default: bool, continues: bool) -> Writing:
        if body.model not in (None, self.name):
            raise Refused(404, f"model: this server has {self.name!r} only", "model_not_found", "model")
        if body.stream_options is not None and not body.stream:
            raise Refused(400, "stream_options: only with stream=true", "invalid_value", "stream_options")
        texts, room = len(prompts) * body.n, self.engine.limits.max_queue
        if texts > room:
            raise Refused(400, f"n: {texts} texts in one request; at most {room}", "invalid_value", "n")
        how = Sampling(body.temperature, body.top_p, body.top_k, body.seed)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        rows = [
            {
                **self._given(prompt),
                "most": self._length(len(prompt), most, default),
                "how": how,
                "stop": stop,
                "index": i,
                "continues": continues,
            }
            for prompt in prompts
            for i in range(body.n)
        ]
        return Writing(self.engine, rows)

    async def _all(self, request: Request, writing: Writing) -> tuple[list[str], list[Any], list[int]]:
        """Texts, why each ended, and how many tokens each has."""
        rows = len(writing.rows)
        texts, counts = [""] * rows, [0] * rows
        ends: list[Any] = [None] * rows
        async for i, piece in writing.each(request):
            texts[i] += piece.text
            ends[i], counts[i] = piece.finish, piece.tokens
        if None in ends:
            raise Refused(499, "the client is gone")  # nobody reads it
        return texts, ends, counts

    def _stream(self, request, body: p.Sampled, writing: Writing, prefix: str, kind: str, read: int, choice):
        head = {"id": f"{prefix}-{writing.id}", "object": kind, "created": writing.created, "model": self.name}
        counted = body.stream_options is not None and body.stream_options.include_usage

        async def events() -> AsyncIterator[dict]:
            counts = [0] * len(writing.rows)
            async for i, piece in writing.each(request):
                counts[i] = piece.tokens
                if piece.text or piece.finish:
                    yield {**head, "choices": [choice(i, piece.text, piece.finish)]}
            if counted:
                yield {**head, "choices": [], "usage": writing.usage(counts, read).model_dump()}

        return _events(events())


def _events(events: AsyncIterator[dict]) -> StreamingResponse:
    """Server-sent events, with OpenAI's end. What fails on the way is told as an event."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        except Refused as refused:
            yield f"data: {bytes(refused.response().body).decode()}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type=STREAM, headers={"Cache-Control": "no-cache"})
