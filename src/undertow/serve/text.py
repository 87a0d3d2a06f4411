"""Text of tokens that come one by one: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "\ufffd"  # how a tokenizer writes bytes that are no character (yet)
BEFORE = 4  # tokens of the prompt that say how the first new one is written (some tokenizers drop a leading space)


class Text:
    """What the tokens so far say, handed out as soon as it is certain.

    A piece is held back while its last character may be incomplete, or while it may turn out to begin a stop string.
    All pieces together are `decode(all tokens)`, cut at the first stop string.

    Args:
        stop: texts that end the writing; they are not part of it.
        prompt: tokens before the first new one.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids = list(prompt[-BEFORE:])
        self.start, self.read = 0, len(self.ids)  # ids[start:read] were handed on and say how the next are written
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain (often none); sets `stopped` where a stop string is complete."""
        self.ids.append(token)
        known, whole = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if whole.endswith(UNFINISHED) or len(whole) <= len(known):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._pass(whole[len(known) :])

    def end(self) -> str:
        """What was held back, if no stop string came."""
        if self.stopped:
            return ""
        known, whole = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        self.start = self.read = len(self.ids)
        piece = self._pass(whole[len(known) :])
        piece, self.held = piece + self.held, ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _pass(self, new: str) -> str:
        text = self.held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((_begun(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
