"""The one thread that runs the model: rows wait in a queue, join the running batch between two tokens, and leave it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undertow.cache import UndertowCache
from undertow.data.format import TextFormat
from undertow.serve.decode import Sampling, choose, ends_of, join, keep, longest, prefill, step
from undertow.serve.look import Look, legend, look, predicted, state
from undertow.serve.text import Text

logger = logging.getLogger(__name__)


class Full(Exception):
    """The queue has no room for these rows."""


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Args:
        max_tokens: new tokens a row at most.
        max_queue: rows that may wait for their turn.
        batch: rows that run at once.
        max_watched: tokens of a prompt that is watched (each is one step).

    Raises:
        ValueError: a limit below 1.
    """

    max_tokens: int = 1024
    max_queue: int = 64
    batch: int = 8
    max_watched: int = 256

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


@dataclass(frozen=True)
class Piece:
    """What a row hands on after a token.

    `finish`: None while it goes on, then `stop`, `length` or `error`. `tokens`: new tokens so far. `seen`: of a watched
    row, what is shown of one token, prompt included.
    """

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    seen: dict | None = None


@dataclass(eq=False)
class Row:
    """One text to write. `deliver` is called from the engine's thread; `cancelled` may be set from any."""

    prompt: Sequence[int]
    most: int
    how: Sampling
    deliver: Callable[[Piece], None]
    memory: Sequence[int] | None = None  # of every token of the prompt: whether it takes in its memory (None: all do)
    stop: Sequence[str] = ()
    index: int = 0  # among the rows of one request: row i draws from seed + i
    continues: bool = True  # whether the text goes on from the prompt (a chat's answer does not)
    watched: bool = False
    cancelled: bool = False
    tokens: int = field(default=0, init=False)

    def start(self, tokenizer):
        self.text = Text(tokenizer, self.stop, self.prompt if self.continues else ())
        self.generator = self.how.generator(self.index)

    def take(self, logits_V: Tensor, ends: frozenset[int]) -> tuple[int, Piece]:
        """The next token, and what is to be handed on."""
        token = choose(logits_V, self.how, self.generator)
        self.tokens += 1
        text, finish = "", None
        if token in ends:
            finish = "stop"
        else:
            text = self.text.add(token)
            finish = "stop" if self.text.stopped else "length" if self.tokens == self.most else None
        if finish:
            text += self.text.end(token if token in ends else None)
        return token, Piece(text, self.tokens, finish)


@dataclass(frozen=True)
class Running:
    """Rows between two tokens: the logits of their next ones, and their cache."""

    rows: tuple[Row, ...] = ()
    logits_BV: Tensor | None = None
    cache: UndertowCache | None = None

    def joined(self, rows: Sequence[Row], logits_BV: Tensor, cache: UndertowCache) -> Running:
        if self.cache is None or self.logits_BV is None:
            return Running(tuple(rows), logits_BV, cache)
        return Running((*self.rows, *rows), torch.cat([self.logits_BV, logits_BV]), join(self.cache, cache))

    def kept(self, places: Sequence[int]) -> Running:
        """These rows alone."""
        if len(places) == len(self.rows):
            return self
        if not places or self.cache is None or self.logits_BV is None:
            return Running()
        return Running(tuple(self.rows[i] for i in places), self.logits_BV[list(places)], keep(self.cache, places))


@dataclass(frozen=True)
class Watched:
    """A watched row: how much of its prompt was fed, the last look and the cache."""

    row: Row
    fed: int = 0
    seen: Look | None = None
    cache: UndertowCache | None = None


class Engine:
    """Runs rows on a model until it is closed. Thread-safe: `submit`, `close`, `waiting`.

    Args:
        model: an `UndertowForCausalLM` in `eval()`; from now on it belongs to the engine's thread.
        tokenizer: to decode with, or a `TextFormat`; no other thread may use it.
    """

    def __init__(self, model, tokenizer, limits: Limits):
        form = TextFormat.of(tokenizer)
        tokenizer, self.memory = form.tokenizer, form.memory
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.ends, self.longest, self.legend = ends_of(model, tokenizer), longest(model), legend(model)
        self.steps = 0  # steps of the batch so far
        self._waiting: deque[Row] = deque()
        self._wake, self._closed = threading.Condition(), False
        self._running, self._new = Running(), list[Row]()
        self._watched: Watched | None = None
        self._thread = threading.Thread(target=self._work, name="undertow-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that wait for their turn."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Rows that run."""
        return len(self._running.rows) + (self._watched is not None)

    def submit(self, rows: Sequence[Row]):
        """Queue the rows of one request, all or none.

        Raises:
            Full: they do not fit.
        """
        with self._wake:
            waiting = sum(not row.cancelled for row in self._waiting)
            if self._closed or waiting + len(rows) > self.limits.max_queue:
                raise Full(f"{waiting} texts are waiting and at most {self.limits.max_queue} may; try again later")
            self._waiting.extend(rows)
            self._wake.notify()

    def close(self):
        """Stop after the current token. Rows that are not done end with an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    # ------------------------------------------------------------------ the engine's own thread

    def _work(self):
        while self._admit():
            try:
                self._turn()
            except Exception as error:  # whatever it is, these rows must hear of it and the next ones must run
                logger.exception("%d texts ended with an error", self.busy)
                self._give_up(type(error).__name__)
        self._give_up("the server is closing")

    def _admit(self) -> bool:
        """Wait for something to do and take in what fits; False when closed."""
        with self._wake:
            while not (self._closed or self._waiting or self._running.rows or self._watched):
                self._wake.wait()
            left: deque[Row] = deque()
            room = self.limits.batch - len(self._running.rows)
            for row in self._waiting:
                if row.cancelled:
                    continue
                if row.watched and self._watched is None:
                    row.start(self.tokenizer)
                    self._watched = Watched(row)
                elif not row.watched and len(self._new) < room:
                    self._new.append(row)
                else:
                    left.append(row)
            self._waiting = left
            return not self._closed

    def _turn(self):
        """One token for every row: new rows join, cancelled ones leave."""
        running = self._running
        running = running.kept([i for i, row in enumerate(running.rows) if not row.cancelled])
        if self._new:
            for row in self._new:
                row.start(self.tokenizer)
            prompts = [row.prompt for row in self._new]
            memory = None
            if any(row.memory is not None for row in self._new):
                memory = [[1] * len(row.prompt) if row.memory is None else row.memory for row in self._new]
            running = running.joined(self._new, *prefill(self.model, prompts, memory))
            self._new = []
        self._running = running
        if running.rows:
            self._running = self._next(running)
        if self._watched is not None:
            self._watched = self._watch(self._watched)

    def _next(self, running: Running) -> Running:
        assert running.logits_BV is not None
        tokens, going = [], []
        for i, row in enumerate(running.rows):
            token, piece = row.take(running.logits_BV[i], self.ends)
            row.deliver(piece)
            if piece.finish is None:
                going.append(i)
                tokens.append(token)
        running = running.kept(going)
        if running.cache is None:
            return running
        self.steps += 1
        logits_BV = step(self.model, tokens, running.cache, self.memory != "none")
        return Running(running.rows, logits_BV, running.cache)

    def _watch(self, watched: Watched) -> Watched | None:
        """One token of a watched row: of its prompt first, then new ones. None when it is done."""
        row, piece, mixed = watched.row, Piece(), None if self.memory != "none" else False
        if row.cancelled:
            return None
        if watched.fed < len(row.prompt):
            token = row.prompt[watched.fed]
            mixed = None if row.memory is None else bool(row.memory[watched.fed])
        else:
            assert watched.seen is not None
            token, piece = row.take(watched.seen.logits_V, self.ends)
        told: dict = {"token": self.tokenizer.decode([token]), "prompt": watched.fed < len(row.prompt)}
        told["predicted"] = None if watched.seen is None else predicted(watched.seen, self.tokenizer, token)
        going, told["state"] = None, None
        if piece.finish is None:
            new, cache = look(self.model, token, watched.cache, mixed)
            going, told["state"] = Watched(row, watched.fed + 1, new, cache), state(new, self.model)
        row.deliver(Piece(piece.text, piece.tokens, piece.finish, told))
        return going

    def _give_up(self, why: str):
        """Every row that was taken in (when closed: every row) ends with an error."""
        rows = [*self._running.rows, *self._new, *([self._watched.row] if self._watched else [])]
        self._running, self._watched, self._new = Running(), None, []
        if self._closed:
            rows += self._waiting
            self._waiting.clear()
        for row in rows:
            row.deliver(Piece(why, row.tokens, "error"))
