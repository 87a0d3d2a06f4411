"""A conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from undertow.data.format import TextFormat
from undertow.serve.decode import Sampling, ends_of, longest, write

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it"


def answer(model, form: TextFormat, messages: list[dict[str, str]], how: Sampling, most: int) -> Iterator[str]:
    """The assistant's next message, piece by piece.

    The oldest exchanges are dropped from `messages`, in place, while the conversation has no room for `most` tokens.

    Raises:
        ValueError: not even the newest message has.
    """
    most = min(most, longest(model) - 1)
    while True:
        prompt = form.conversation(messages)
        room = longest(model) - len(prompt)
        if room >= most:
            return write(model, form, prompt, how, most, ends_of(model, form.tokenizer))
        if len(messages) == 1:
            raise ValueError(f"a message of {len(prompt)} tokens leaves no room for {most} more: /reset or shorten it")
        del messages[:2]


def chat(
    model, tokenizer, how: Sampling, most: int, read: Callable[[], str], say: Callable[[str], None], note=None
) -> None:
    """Talk until `/quit` or the end of the input.

    Args:
        tokenizer: a `TextFormat`, or a tokenizer that carries one (else: see `TextFormat.of`).
        most: new tokens of an answer at most.
        read: returns the next line of the user; raises EOFError at the end.
        say: takes each piece of an answer, and a line break after the last.
        note: takes what is said about the conversation itself (None: nowhere).
    """
    note = note or (lambda line: None)
    messages: list[dict[str, str]] = []
    form = TextFormat.of(tokenizer)
    note(HELP)
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages.clear()
            note("forgotten")
        elif line.startswith("/"):
            note(f"{line.split()[0]}: no such command; {HELP}")
        elif any("\ud800" <= c <= "\udfff" for c in line):
            note("that is not UTF-8")
        elif line:
            messages.append({"role": "user", "content": line})
            _exchange(model, form, messages, how, most, say, note)


def _exchange(model, form: TextFormat, messages: list, how: Sampling, most: int, say, note) -> None:
    """One answer, kept in the history. Ctrl-C ends it early, and what was said stays."""
    before, pieces = len(messages), list[str]()
    try:
        stream = answer(model, form, messages, how, most)
    except ValueError as error:
        messages.pop()
        note(str(error))
        return
    if len(messages) < before:
        note(f"the conversation is too long: its first {before - len(messages)} messages are forgotten")
    try:
        for piece in stream:
            pieces.append(piece)
            say(piece)
    except KeyboardInterrupt:
        note(" (stopped)")
    say("\n")
    messages.append({"role": "assistant", "content": "".join(pieces)})
