"""Text of tokens that come one by one: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "\ufffd"  # how a tokenizer writes bytes that are no character (yet)
BEFORE = 4  # tokens of the prompt that say how the first new one is written (some tokenizers drop a leading space)

Letter = tuple[str, bool]  # what is read, and whether it is shown; a special token is one letter, and not shown


class Text:
    """What the tokens so far say, handed out as soon as it is certain.

    A piece is held back while its last character may be incomplete, or while it may turn out to begin a stop string.
    All pieces together are `decode(all tokens)` without special tokens, cut at the first stop string. Stop strings are
    looked for in what is shown, and in the same text with its special tokens written out: those count as a whole, so
    that "|" does not stop at "<|end|>".

    Args:
        stop: texts that end the writing; they are not part of it.
        prompt: tokens before the first new one.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.special = _special(tokenizer) if stop else {}
        self.ids = list(prompt[-BEFORE:])
        self.start, self.read = 0, len(self.ids)  # ids[start:read] were handed on and say how the next are written
        self.held: list[Letter] = []
        self.after: list[Letter] = []  # special tokens in the middle of a character that is not finished
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain (often none); sets `stopped` where a stop string is complete."""
        self.ids.append(token)
        new = self._new()
        if token in self.special:
            return self._pass_special(new, token)
        if new.endswith(UNFINISHED) or not new:
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._pass(_shown(new))

    def end(self, token: int | None = None) -> str:
        """What was held back, if no stop string came. `token`: the one that ended the text, which is not shown."""
        if self.stopped:
            return ""
        new = self._new()
        self.start = self.read = len(self.ids)
        last = [] if token is None or not self.stop else [(self._decode([token], False), False)]
        piece = self._pass(_shown(new), last)
        piece, self.held = piece + "".join(letter for letter, shown in self.held if shown), []
        return piece

    def _new(self) -> str:
        """What the tokens since `read` say."""
        known, whole = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        return whole[len(known) :]

    def _decode(self, ids: list[int], skip: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip)

    def _pass_special(self, new: str, token: int) -> str:
        letter = (self.special[token], False)
        if not new:
            return self._pass([letter])
        unfinished = [*self.held, *_shown(new), *self.after, letter]  # as it reads if it ends here
        found = _first(unfinished, self.stop)
        if found is None:
            self.after.append(letter)
            return ""
        return self._stop(unfinished[:found])

    def _pass(self, new: Sequence[Letter], last: Sequence[Letter] = ()) -> str:
        letters, self.after = [*self.held, *new, *self.after, *last], []
        found = _first(letters, self.stop)
        if found is not None:
            return self._stop(letters[:found])
        keep = _first(letters, self.stop, begun=True)
        self.held = [] if keep is None else letters[keep:]
        return "".join(letter for letter, shown in letters[:keep] if shown)

    def _stop(self, letters: Sequence[Letter]) -> str:
        self.stopped, self.held = True, []
        return "".join(letter for letter, shown in letters if shown)


def _special(tokenizer) -> dict[int, str]:
    """What is left out when a text is decoded, and how it is written."""
    added = {token: str(one) for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _shown(text: str) -> list[Letter]:
    return [(letter, True) for letter in text]


def _first(letters: Sequence[Letter], stops: Sequence[str], begun: bool = False) -> int | None:
    """The first place where a stop string lies (`begun`: may lie, as far as one can see); None: there is none."""
    if not stops:
        return None
    places = range(len(letters))
    for first in places:
        readings = [[letters[n][0] for n in places[first:]]]
        if letters[first][1]:
            readings.append([letters[n][0] for n in places[first:] if letters[n][1]])
        if any(_lies(reading, stop, begun) for reading in readings for stop in stops):
            return first
    return None


def _lies(letters: Sequence[str], stop: str, begun: bool) -> bool:
    """Whether the letters begin with `stop` (`begun`: or end before it does)."""
    for letter in letters:
        if not stop.startswith(letter):
            return False
        stop = stop[len(letter) :]
        if not stop:
            return True
    return begun
