"""Writes the data beside it: invented from templates, in the published formats, for recipes that must run offline.

    python recipes/small/data/make.py

gsm8k_*.jsonl      word problems of two or three sums; {question, steps, answer} as GSM8K-aug, a formula in every step
hotpotqa_*.jsonl   questions that take two of four short paragraphs; the fields of HotpotQA on the hub
topics_*.csv       sentences under a topic; the columns of GPTTRM's files

Nothing in them is true, and a score on them says that a recipe runs, not how good a method is. The same every time; no
question or sentence of one file is in another.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
PEOPLE = ("Anna", "Ben", "Clara", "David", "Eva", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karla", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "plums", "shells", "stamps", "stones")
SYLLABLES = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
KINDS = ("painter", "singer", "doctor", "sailor", "teacher", "writer")


def gsm8k(rng: random.Random) -> dict:
    """Start with some, get more, then (half the time) share or double: two or three steps."""
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    has, gets, times = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 4)
    more = gets * times
    total = has + more
    question = f"{who} has {has} {thing} and gets {gets} more on each of {times} days."
    steps = [f"<<{gets}*{times}={more}>>", f"<<{has}+{more}={total}>>"]
    kind = rng.randrange(3)
    if kind == 0:
        gives = rng.randint(1, total - 1)
        question += f" Then {who} gives {gives} away."
        steps.append(f"<<{total}-{gives}={total - gives}>>")
        total -= gives
    elif kind == 1:
        question += " Then the number doubles."
        steps.append(f"<<{total}*2={total * 2}>>")
        total *= 2
    return {"question": f"{question} How many {thing} does {who} have?", "steps": steps, "answer": str(total)}


def hotpotqa(rng: random.Random) -> dict:
    """Who made a thing stands in one paragraph, where that person lives in another; the two others lead nowhere."""
    names = _names(rng, 8)
    works, people, homes, fame = names[:2], names[2:4], names[4:6], names[6:]
    paragraphs = [(works[i], [f"{works[i]} was made by {people[i]}.", f"It is known in {fame[i]}."]) for i in (0, 1)]
    for who, home in zip(people, homes, strict=True):
        paragraphs.append((who, [f"{who} is a {rng.choice(KINDS)}.", f"{who} lives in {home}."]))
    rng.shuffle(paragraphs)
    asked = rng.randrange(2)
    return {
        "id": f"{rng.getrandbits(64):016x}",
        "question": f"Where does the maker of {works[asked]} live?",
        "answer": homes[asked],
        "type": "bridge",
        "level": rng.choice(("easy", "medium", "hard")),
        "supporting_facts": {"title": [works[asked], people[asked]], "sent_id": [0, 1]},
        "context": {"title": [title for title, _ in paragraphs], "sentences": [lines for _, lines in paragraphs]},
    }


def topics(rng: random.Random) -> dict:
    """One sentence about an invented place, person or thing."""
    (name, other), number = _names(rng, 2), rng.randint(2, 99)
    topic, sentence = rng.choice(
        (
            ("Places", f"{name} is a town of {number} thousand people on the river {other}."),
            ("Places", f"The hills of {name} rise {number} hundred metres above {other}."),
            ("People", f"{name} {other} was a {rng.choice(KINDS)} who lived to the age of {number}."),
            ("People", f"At {number}, {name} {other} became the best known {rng.choice(KINDS)} of the country."),
            ("Things", f"A {name.lower()} is a tool with {number} parts, first made in {other}."),
            ("Things", f"Most {rng.choice(THINGS)} from {name} are sold in {other} for {number} coins."),
        )
    )
    return {"topic": topic, "text": sentence}


def different(make: Callable[[random.Random], dict], key: str, seed: int) -> Iterator[dict]:
    """Records without end, none with the same `key` as one before."""
    rng, seen = random.Random(seed), set()
    while True:
        record = make(rng)
        if record[key] not in seen:
            seen.add(record[key])
            yield record


def main(folder: Path = HERE) -> None:
    for name, make, counts in (("gsm8k", gsm8k, (400, 60)), ("hotpotqa", hotpotqa, (130, 40))):
        records = different(make, "question", seed=0)
        for split, count in zip(("train", "test"), counts, strict=True):
            lines = [json.dumps(next(records)) + "\n" for _ in range(count)]
            (folder / f"{name}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    records = different(topics, "text", seed=0)
    for split, count in (("train", 1000), ("valid", 100)):
        with (folder / f"topics_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["topic", "text"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(next(records) for _ in range(count))


def _names(rng: random.Random, count: int) -> list[str]:
    """Different invented names."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()] = None
    return list(names)


if __name__ == "__main__":
    main()
