"""How a text becomes a model's input: one value that carries it from training to serving.

    form = TextFormat.from_pretrained("runs/demo-1/model")
    model.generate(**form.prompt("3 + 4 = "), max_new_tokens=8)

A model is used as it was trained only if its texts are read as they were then: with the same tokenizer, begun by a bos
or not, special tokens that a text spells out taken for text or for these tokens, a prompt laid out as a chat or plain,
and the memory acting where it acted. `TextFormat` says all of it. It rides on the tokenizer (the key `undertow` of
tokenizer_config.json), so that it lies in every folder the tokenizer is saved in, checkpoints included.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from undertow.data.conversation import Conversation, special_texts
from undertow.data.tokenizer import adds_bos, begin_with, check_tokenizer, tokenizer_hash
from undertow.tasks.base import Example, Tags

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextFormat"]

IGNORED = -100  # the label that no loss counts
SAVED = "undertow"  # the key in tokenizer_config.json
_RECIPE = "format-1"  # part of the cache key: change it when a text would become other tokens

Memory = Literal["all", "response", "none"]
SpecialTokens = Literal["text", "ids"]
Layout = Literal["plain", "chat"]
_ALLOWED = {
    "loss": ("response", "all"),
    "memory": get_args(Memory),
    "special_tokens": get_args(SpecialTokens),
    "layout": get_args(Layout),
    "bos": (True, False),
    "eos": (True, False),
}


@dataclass(frozen=True)
class Tokens:
    """A text as tokens.

    Attributes:
        ids: one a token.
        memory: 1 where the token takes in the memory of the one before it, 0 where not.
    """

    ids: list[int]
    memory: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded:
    """One example as tokens; the lists have one entry a token.

    Attributes:
        ids: prompt (begun as the format says), response, eos; of tags the input and eos.
        labels: in the model's convention, `labels[t]` is the target of position t-1; -100 where there is none.
        memory: 1 where the token takes in the memory of the one before it (T2MLR's control flow 2), 0 where not.
        prompt: how many tokens are given when the response is generated.
    """

    ids: list[int]
    labels: list[int]
    memory: list[int]
    prompt: int


@dataclass(frozen=True)
class TextFormat:
    """All that turns a text into a model's input.

    Args:
        tokenizer: of the model.
        loss: of examples; `response`: the prompt is not to be predicted; `all`: every token is. Tags are all targets.
        memory: `all`: every token takes in the memory of the one before it; `response`: those of a prompt do not, what
            is written after it does; `none`: no token does.
        bos: whether documents and prompts begin with the tokenizer's bos token, if it has one.
        eos: whether documents end with its eos token. A response always does: something must end it.
        special_tokens: what a special token is that a text spells out: `text`, its letters, or `ids`, that token. The
            markers that a chat template writes itself are always tokens.
        layout: of a prompt that is answered: `chat`, the user's turn of the tokenizer's chat template, or `plain`.
            None: `chat` where there is a template.

    Raises:
        ValueError: a value that is not allowed, or `chat` without a template. One line.
    """

    tokenizer: PreTrainedTokenizerBase
    loss: Literal["response", "all"] = "response"
    memory: Memory = "all"
    bos: bool = True
    eos: bool = True
    special_tokens: SpecialTokens = "text"
    layout: Layout | None = None

    def __post_init__(self):
        if self.layout is None:
            object.__setattr__(self, "layout", "chat" if self.has_template else "plain")
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed: {', '.join(map(str, allowed))}")
        if self.layout == "chat" and not self.has_template:
            raise ValueError("layout='chat': the tokenizer has no chat template; allowed: plain")

    # ------------------------------------------------------------------ where it comes from and where it is kept

    @classmethod
    def of(cls, given: TextFormat | PreTrainedTokenizerBase, trained: bool = False) -> TextFormat:
        """The format itself, or the one that a tokenizer carries.

        Args:
            given: a format, or a tokenizer.
            trained: of a tokenizer that carries none: what training takes by default. False: what the tokenizer itself
                does when it is called (a model from elsewhere): a bos where it adds one, special tokens as it reads
                them, plain prompts, memory everywhere.

        Raises:
            ValueError: it carries something that this version does not know. One line.
        """
        if isinstance(given, TextFormat):
            return given
        held = given.init_kwargs.get(SAVED)
        if held is None and trained:
            return cls(given)
        if not isinstance(held, dict | None):
            raise ValueError(f"tokenizer_config.json: {SAVED}: {held!r}: must be a mapping")
        own: dict[str, Any] = {"loss": "all", "layout": "plain", "bos": adds_bos(given)}
        own["special_tokens"] = "text" if given.split_special_tokens else "ids"
        unknown = sorted(set(held or {}) - set(_ALLOWED))
        if unknown:
            raise ValueError(f"tokenizer_config.json: {SAVED}.{unknown[0]}: unknown; allowed: {', '.join(_ALLOWED)}")
        return cls(given, **own | (held or {}))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextFormat:
        """The format of a run's folder, or of any folder with a tokenizer. Raises ValueError: there is none."""
        from undertow.data.tokenizer import load_tokenizer

        inner = Path(folder) / "model"
        return cls.of(load_tokenizer(inner if (inner / "config.json").exists() else folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer, and with it the format."""
        self.carried().tokenizer.save_pretrained(folder)

    def carried(self) -> TextFormat:
        """The same, with a copy of the tokenizer that carries it.

        Called by others, it begins texts as the format says. Without a chat template it also reads special tokens so;
        with one it does not: `apply_chat_template` of other tools would take the template's own markers apart.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.init_kwargs[SAVED] = self.to_dict()
        if tokenizer.is_fast and adds_bos(tokenizer) != bool(self.before):
            begin_with(tokenizer, self.before)
        if not self.has_template:
            split = self.special_tokens == "text"
            tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = split
        return replace(self, tokenizer=tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokenizer, as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tokenizer"}

    def parts(self) -> list[str]:
        """What decides which tokens a text becomes, for cache keys."""
        template = json.dumps(getattr(self.tokenizer, "chat_template", None))
        return [_RECIPE, tokenizer_hash(self.tokenizer), template, json.dumps(self.to_dict(), sort_keys=True)]

    # ------------------------------------------------------------------ tokens

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def before(self) -> list[int]:
        """The token that a text begins with, if any."""
        return [self.tokenizer.bos_token_id] if self.bos and self.tokenizer.bos_token_id is not None else []

    @property
    def after(self) -> list[int]:
        """The token that a document ends with, if any."""
        return [self.tokenizer.eos_token_id] if self.eos else []

    @cached_property
    def special(self) -> tuple[str, ...]:
        """How the tokenizer's special tokens are spelt, the longest first."""
        return special_texts(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, nothing before or after them."""
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=self.special_tokens == "text",
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # texts may be longer than the model's context
        )["input_ids"]

    def begun(self, ids: list[int]) -> list[int]:
        """Tokens after the one that a text begins with; one that spells it out itself does not get a second one."""
        spelt = self.special_tokens == "ids" and ids[:1] == self.before
        return ids if spelt else [*self.before, *ids]

    def framed(self, ids: list[int]) -> list[int]:
        """A document's tokens between what it begins and ends with."""
        ids = self.begun(ids)
        spelt = self.special_tokens == "ids" and len(ids) > 1 and ids[-1:] == self.after
        return ids if spelt else [*ids, *self.after]

    def document(self, text: str) -> Tokens:
        """A whole document. It has no prompt: the memory acts everywhere, but for `none`."""
        ids = self.framed(self.encode([text])[0])
        return Tokens(ids, [int(self.memory != "none")] * len(ids))

    def begin(self, text: str) -> Tokens:
        """A text that the model is to go on from, as a prompt was in training."""
        if self.layout == "chat":
            return self.conversation([{"role": "user", "content": text.rstrip()}])
        return self.given(self.begun(self.encode([text])[0]))

    def given(self, ids: Sequence[int]) -> Tokens:
        """Tokens of a prompt, just as they are."""
        return Tokens(list(ids), [int(self.memory == "all")] * len(ids))

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> Tokens:
        """A conversation up to where the assistant answers.

        What the assistant has said already is response, everything else prompt. Special tokens that a message spells
        out are read as `special_tokens` says.

        Raises:
            ValueError: the tokenizer has no chat template.
            jinja2.TemplateError: the template refuses the messages.
        """
        if not self.has_template:
            raise ValueError("the tokenizer has no chat template")
        talk = Conversation.rendered(self.tokenizer, messages, self.special if self.special_tokens == "text" else ())
        ids, answered = talk.tokens(self.tokenizer)
        memory = [int(self.memory == "all" or (self.memory == "response" and said)) for said in answered]
        return Tokens(ids, memory)

    def example(self, example: Example | Tags) -> Encoded:
        """A task's example. Raises ValueError (one line): the input and the target of tags differ in tokens."""
        if isinstance(example, Tags):
            return self._tags(example)
        prompt = self.begin(example.prompt)
        response = [*self.encode([example.response])[0], self.tokenizer.eos_token_id]
        given = [IGNORED] * len(prompt) if self.loss == "response" else prompt.ids
        return Encoded(
            ids=[*prompt.ids, *response],
            labels=[IGNORED, *[*given, *response][1:]],  # nothing stands before the first token to predict it
            memory=[*prompt.memory, *[int(self.memory != "none")] * len(response)],
            prompt=len(prompt),
        )

    def _tags(self, tags: Tags) -> Encoded:
        ids, target = self.encode([tags.input, tags.target])
        if not len(ids) == len(target) == len(tags.memory):
            raise ValueError(
                f"tags: input has {len(ids)} tokens, target {len(target)}, memory {len(tags.memory)}: must be equal"
            )
        on = int(self.memory != "none")
        memory = list(tags.memory) if self.memory == "response" else [on] * len(ids)
        return Encoded([*ids, self.tokenizer.eos_token_id], [IGNORED, *target], [*memory, on], len(ids))

    # ------------------------------------------------------------------ a model's arguments

    def prompt(self, text: str | Sequence[str], new_tokens: int | None = None) -> dict[str, Tensor]:
        """Texts to go on from, as arguments of `model.generate`; see `begin` and `batch`."""
        return self.batch([self.begin(one) for one in ([text] if isinstance(text, str) else text)], new_tokens)

    def chat(self, messages: Sequence[Mapping[str, Any]], new_tokens: int | None = None) -> dict[str, Tensor]:
        """A conversation to be answered, as arguments of `model.generate`; see `conversation` and `batch`."""
        return self.batch([self.conversation(messages)], new_tokens)

    def batch(self, prompts: Sequence[Tokens], new_tokens: int | None = None) -> dict[str, Tensor]:
        """Prompts as one batch that ends together.

        Args:
            prompts: at least one.
            new_tokens: how many will be generated at most: with `memory="none"` the mask must cover them too.

        Returns:
            `input_ids`, `attention_mask` (0 at padding) and, unless the memory acts everywhere, `memory_mask`: int64
            `_BT`. With `memory="none"` the mask has `new_tokens` more columns.

        Raises:
            ValueError: `memory` is `none` and `new_tokens` is not said.
        """
        import torch.nn.functional as F

        memory = None if self.memory == "all" else [one.memory for one in prompts]
        made = pad_left([one.ids for one in prompts], pad_id(self.tokenizer), memory)
        if self.memory == "none":
            if new_tokens is None:
                raise ValueError("memory='none': say new_tokens, how many are generated: they take in no memory either")
            made["memory_mask"] = F.pad(made["memory_mask"], (0, new_tokens))
        return made

    # ------------------------------------------------------------------ what texts hold

    def spelt(self, texts: Iterable[str]) -> dict[str, int]:
        """How often texts spell out each special token, those that occur."""
        counts = dict.fromkeys((one for one in self.special if len(one) > 1), 0)
        for text in texts:
            for one in counts:
                counts[one] += text.count(one)
        return {one: count for one, count in counts.items() if count}

    def say_spelt(self, texts: Iterable[str], what: str) -> None:
        """Warn once where `what` spells out special tokens, with what becomes of them."""
        found = self.spelt(texts)
        if found:
            said = ", ".join(f"{one} {count:,} time{'s' * (count != 1)}" for one, count in found.items())
            become = (
                "these tokens" if self.special_tokens == "ids" else "text (data.special_tokens: ids would be tokens)"
            )
            warnings.warn(f"special tokens in {what}: {said}: they are read as {become}", stacklevel=3)


def carry(folder: Path, values: Mapping[str, Any]) -> bool:
    """Let the tokenizer saved in a folder carry these fields of a format. Returns False: there is no tokenizer."""
    path = folder / "tokenizer_config.json"
    if not path.exists() and not (folder / "tokenizer.json").exists():
        return False
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(held | {SAVED: dict(values)}, indent=2, ensure_ascii=False), encoding="utf-8")
    return True


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What is written at padding: the pad token, eos where there is none (0 where there is neither)."""
    known = (one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None)
    return next(known, 0)


def pad_left(sequences: Sequence[Sequence[int]], pad: int, memory: Sequence[Sequence[int]] | None = None, device=None):
    """Sequences of tokens as one batch that ends together, for generation.

    Args:
        sequences: at least one.
        pad: the id written at padding.
        memory: memory masks of the same lengths.
        device: of what is returned.

    Returns:
        `input_ids` and `attention_mask` (0 at padding), and `memory_mask` (1 at padding) if `memory` is given: int64
        tensors of shape (B, T), T the length of the longest.
    """
    import torch

    width = max(map(len, sequences))

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows], device=device)

    batch = {"input_ids": padded(sequences, pad), "attention_mask": padded([[1] * len(row) for row in sequences], 0)}
    return batch if memory is None else batch | {"memory_mask": padded(memory, 1)}


def checked(form: TextFormat) -> TextFormat:
    """The format, if documents can be prepared with it. Raises ValueError (one line): see `check_tokenizer`."""
    check_tokenizer(form.tokenizer)
    return form
