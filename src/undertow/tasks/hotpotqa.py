"""HotpotQA (arXiv 1809.09600): questions whose answer takes two of the given paragraphs."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Any

from undertow.tasks.base import Example, Record
from undertow.tasks.gsm8k import final
from undertow.tasks.loaded import Loaded


@dataclass(frozen=True)
class HotpotQA(Loaded):
    """Questions about ten given paragraphs, two of which are needed.

    A record is as on the hub, `{question, answer, type, level, context {title, sentences}, supporting_facts {title,
    sent_id}}`; files may also be in the first publication's form (lists of pairs). The published validation split is
    our test; ours is taken from the training questions.

    Args:
        path, validation, test: see `Loaded`.
        chain: the response is first the sentences that support the answer, a line each, then `### answer`.
    """

    chain: bool = False

    fields = ("question", "answer", "context")

    def published(self):
        return "hotpotqa/hotpot_qa", "distractor", {"train": "train", "test": "validation"}

    def parsed(self, record: Record) -> Record:
        return {
            "question": record["question"].strip(),
            "answer": record["answer"].strip(),
            "type": record.get("type"),
            "level": record.get("level"),
            "context": _columns(record["context"], ("title", "sentences")),
            "supporting_facts": _columns(record.get("supporting_facts") or [], ("title", "sent_id")),
        }

    def example(self, record: Record) -> Example:
        context = record["context"]
        paragraphs = [f"{title}: {_joined(lines)}" for title, lines in zip(*context.values(), strict=True)]
        response = record["answer"]
        if self.chain:
            response = "\n".join([*self._support(record), f"### {record['answer']}"])
        prompt = "\n".join([*paragraphs, "", record["question"], "", ""])
        return Example(prompt, response, bucket=record.get("level") or "all")

    def correct(self, record: Record, text: str) -> bool:
        return normal(final(text) if self.chain else text) == normal(record["answer"])

    def key(self, record: Record) -> str:
        return " ".join(record["question"].lower().split())

    def _support(self, record: Record) -> list[str]:
        """The supporting sentences; a few published references point past the end of their paragraph."""
        paragraphs = dict(zip(*record["context"].values(), strict=True))
        facts = zip(*record["supporting_facts"].values(), strict=True)
        return [paragraphs[title][i].strip() for title, i in facts if i < len(paragraphs.get(title, ()))]


def normal(text: str) -> str:
    """An answer as exact match compares it: lower case, without punctuation, articles and further spaces."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _columns(value: Any, names: tuple[str, str]) -> dict[str, list]:
    """Pairs, or a mapping of two lists, as the mapping."""
    pairs = list(zip(*(value[name] for name in names), strict=True)) if isinstance(value, dict) else value
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{pair!r}: must be a pair of {' and '.join(names)}")
    return {name: [pair[i] for pair in pairs] for i, name in enumerate(names)}


def _joined(sentences: list[str]) -> str:
    return " ".join(sentence.strip() for sentence in sentences)
