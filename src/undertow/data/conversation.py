"""A conversation, written out by a chat template: what of it is the template's own, and what each message says.

A template's markers are tokens; a message that spells one out is not to open or end a turn. So the two must be told
apart in the text that the template makes: it is made a second time with each message between two marks that occur
nowhere else. A template that then writes something else (it rewrites messages) cannot be told apart, which is said.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PRIVATE = range(0xE000, 0xF8FF)  # characters that mean nothing: Unicode's area for private use
_TEMPLATE, _MESSAGE, _ANSWER, _END = 0, 1, 2, 3  # whose a character is; the last: of the marker that ends an answer


@dataclass(frozen=True)
class Conversation:
    """A conversation as text.

    Attributes:
        text: what the template makes of it, up to where the assistant answers.
        owners: whose each character is: the template's, a message's, an answer's (what the assistant has said), or that
            of the template's marker that ends an answer.
        special: how special tokens are spelt that a message does not mean; the longest first.
    """

    text: str
    owners: bytes
    special: tuple[str, ...] = ()

    @classmethod
    def rendered(
        cls, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], special: tuple[str, ...] = ()
    ) -> Conversation:
        """Messages as the tokenizer's chat template writes them. Raises what the template raises."""
        text = _render(tokenizer, messages)
        spelt = any(one in str(message.get("content")) for message in messages for one in special)
        if not spelt and all(message.get("role") != "assistant" for message in messages):
            return cls(text, bytes(len(text)))
        owners = _owners(tokenizer, messages, text)
        if owners is None:
            warnings.warn(
                "the chat template rewrites messages, so they cannot be told from its own text: earlier answers count "
                "as prompt, and special tokens that messages spell out are those tokens",
                stacklevel=3,
            )
            return cls(text, bytes(len(text)))
        return cls(text, _ended(text, owners, special_texts(tokenizer)), special)

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
        """The tokens, and whether each is of something that the assistant has said."""
        ids: list[int] = []
        answered: list[bool] = []
        for start, end, whole in self._parts(tokenizer):
            encoded = tokenizer(
                self.text[start:end],
                add_special_tokens=False,
                split_special_tokens=not whole,
                return_offsets_mapping=tokenizer.is_fast,
                verbose=False,
            )
            ids += encoded["input_ids"]
            if tokenizer.is_fast:
                answered += [self.owners[start + at] in (_ANSWER, _END) for at, _ in encoded["offset_mapping"]]
            else:
                answered += [False] * len(encoded["input_ids"])
        return ids, answered

    def _parts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int, bool]]:
        """`(start, end, whether special tokens in it are tokens)`: all at once where no message spells one out."""
        found = list(_found(self.text, self.special))
        markers = [match for match in found if self.owners[match.start()] in (_TEMPLATE, _END)]
        if len(markers) == len(found):
            yield 0, len(self.text), True
            return
        done, known = 0, {one.content: one for one in tokenizer.added_tokens_decoder.values()}
        for match in markers:
            start, end, marker = match.start(), match.end(), known[match[0]]
            while marker.lstrip and start > done and self._blank(start - 1):
                start -= 1
            while marker.rstrip and end < len(self.text) and self._blank(end):
                end += 1  # white space that the token takes in
            if start > done:
                yield done, start, False
            yield start, end, True
            done = end
        if done < len(self.text):
            yield done, len(self.text), False

    def _blank(self, at: int) -> bool:
        return self.text[at].isspace() and self.owners[at] == _TEMPLATE


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """How a tokenizer's special tokens are spelt, the longest first."""
    added = (one.content for one in tokenizer.added_tokens_decoder.values() if one.special)
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=lambda one: (-len(one), one)))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    given = [dict(one) for one in messages]
    return str(tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False))


def _found(text: str, special: Sequence[str]) -> Iterator[re.Match]:
    return re.finditer("|".join(map(re.escape, special)), text) if special else iter(())


def _owners(tokenizer, messages: Sequence[Mapping[str, Any]], text: str) -> bytes | None:
    """Whose each character is; None where it cannot be said."""
    known = text + "".join(str(message) for message in messages)
    opening, closing = [mark for mark in map(chr, _PRIVATE) if mark not in known][:2]
    marked, roles = [], []
    for message in messages:
        content = message.get("content")
        inner = content.strip() if isinstance(content, str) else ""
        if inner:  # marks stand within white space, which templates take away
            before, _, after = str(content).partition(inner)
            message = {**message, "content": f"{before}{opening}{inner}{closing}{after}"}
            roles.append((inner, message.get("role")))
        marked.append(message)
    pieces = re.split(f"{opening}(.*?){closing}", _render(tokenizer, marked), flags=re.DOTALL)
    if "".join(pieces) != text:
        return None
    made, at = bytearray(), 0
    for number, piece in enumerate(pieces):
        owner = _TEMPLATE
        if number % 2:
            place = next((i for i in range(at, len(roles)) if roles[i][0] == piece), None)
            if place is None:
                return None  # a message that comes twice, or in another order
            at, owner = place + 1, _ANSWER if roles[place][1] == "assistant" else _MESSAGE
        made += bytes([owner]) * len(piece)
    return bytes(made)


def _ended(text: str, owners: bytes, special: Sequence[str]) -> bytes:
    """The marker that follows an answer at once belongs to it: it was written, too."""
    made = bytearray(owners)
    for match in _found(text, special):
        start = match.start()
        if start and owners[start] == _TEMPLATE and owners[start - 1] == _ANSWER:
            made[start : match.end()] = bytes([_END]) * (match.end() - start)
    return bytes(made)
