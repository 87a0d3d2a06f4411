"""GSM8K (arXiv 2110.14168) and GSM8K-aug (arXiv 2311.01460): grade-school word problems, solved in steps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from undertow.tasks.base import Example, Record
from undertow.tasks.loaded import Loaded

_FORMULA = re.compile(r"<<.*?>>")
_MARK = re.compile(r"####?|\b[Tt]he (?:final )?answer is\b:?")
_CURRENCY = r"[$\u20ac\u00a3\u00a5]?"
_NUMBER = re.compile(
    rf"(?:(?<![0-9)])(-) ?{_CURRENCY}|(?<![0-9.]){_CURRENCY}) ?"
    r"(?:([0-9]+) (?=[0-9]+/[0-9]))?"  # the whole of 1 1/2
    r"([0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?|[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?: ?/ ?([0-9]+))?"
)
_ALONE = re.compile(r"\W*[0-9][0-9,. ]*(?:/ ?[0-9]+)?\W*|\W*\.[0-9]+\W*")
_LONGEST = 300  # letters of a number


@dataclass(frozen=True)
class GSM8K(Loaded):
    """Grade-school word problems, solved in steps: GSM8K and GSM8K-aug.

    A record is `{question, steps, answer}`, the steps a list or text; files may also be in the first publication's
    form, in which `answer` holds the steps, a line each, and after `####` the answer. The prompt is the question; the
    response is the steps, a line each, and `### answer` (as T2MLR trains on it).

    Args:
        path, validation, test: see `Loaded`.
        variant: what the hub is asked for: `main` is openai/gsm8k (train, test), `aug` whynlp/gsm8k-aug (all three).
        steps: `symbolic`: the formulas (`<<48/2=24>>`) only; `words`: the sentences, without the formulas in them.
    """

    variant: Literal["main", "aug"] = "main"
    steps: Literal["symbolic", "words"] = "symbolic"

    fields = ("question", "answer")

    def published(self):
        if self.variant == "main":
            return "openai/gsm8k", "main", {"train": "train", "test": "test"}
        name = "whynlp/gsm8k-aug" if self.steps == "symbolic" else "whynlp/gsm8k-aug-nl"
        return name, None, {"train": "train", "validation": "validation", "test": "test"}

    def read(self, source: Any) -> Iterator[Record]:
        count = bare = 0
        for record in super().read(source):
            count += 1
            bare += not self._written(record["steps"])
            yield record
        what = "a formula (<<48/2=24>>)" if self.steps == "symbolic" else "a sentence"
        if bare and bare == count:
            other = "words" if self.steps == "symbolic" else "symbolic"
            raise ValueError(f"{source}: steps={self.steps!r}: none of {count} solutions holds {what}; try {other!r}")
        if bare:
            said = f"{source}: {bare} of {count} solutions hold no {what[2:]}: their response is the answer alone"
            warnings.warn(said, stacklevel=2)

    def parsed(self, record: Record) -> Record:
        question, steps, answer = record["question"], record.get("steps"), record["answer"]
        if not isinstance(question, str):
            raise ValueError(f"question is {type(question).__name__}; must be text")
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # a column of whole numbers with a gap somewhere is read as floats
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"answer is {type(answer).__name__}; must be text or a number")
        solution, mark, last = str(answer).rpartition("####")
        if steps is None:
            if not mark:
                raise ValueError(f"neither steps nor '####' in its answer ({solution or last!r:.60})")
            steps = solution
        if isinstance(steps, str):
            steps = re.sub(r">>\s+<<", ">>\n<<", steps).strip().splitlines()  # formulas in a row are steps
        if not isinstance(steps, list):
            raise ValueError(f"steps is {type(steps).__name__}; must be a list or text")
        steps = [str(step) for step in steps]
        if steps and record.get("steps") is not None and not self._written(steps):
            raise ValueError(f"steps={self.steps!r}: none of its steps holds such ({steps[0]!r})")
        return {"question": question.strip(), "steps": steps, "answer": last.strip()}

    def example(self, record: Record) -> Example:
        count = len(record["steps"])
        return Example(
            prompt=f"{record['question']}\n\n",
            response="\n".join([*self._written(record["steps"]), f"### {record['answer']}"]),
            bucket=f"{count} step{'s' * (count != 1)}",
        )

    def correct(self, record: Record, text: str) -> bool:
        """The last answer has the right value, as numbers: 18, 18.00, $18, 18 apples, 1,080 and 1080, 3/4 and 0.75.

        The answer is what follows the last `###`, `####` or `The answer is`; without one, the last line if that is a
        number alone. Of it the first number counts (GSM8K's own evaluation takes the first after `####`, and leaves
        out commas; units, % and currency signs are left out, too). Without any number the words are compared.
        """
        marked = _MARK.split(text)
        said = marked[-1] if len(marked) > 1 else final(text)
        gold, found = value(record["answer"]), value(said)
        if gold is None or found is None:
            return gold is found and _words(said) == _words(record["answer"])
        return gold == found and (len(marked) > 1 or _ALONE.fullmatch(_signs(said)) is not None)

    def key(self, record: Record) -> str:
        return " ".join(record["question"].lower().split())

    def _written(self, steps: list[str]) -> list[str]:
        if self.steps == "symbolic":
            return [formula for step in steps for formula in _FORMULA.findall(step)]
        return [sentence for step in steps if (sentence := _FORMULA.sub("", step).strip())]


def final(text: str) -> str:
    """What is written as the answer: the text after the last `###` or `####`; without one, the last line."""
    before, *after = re.split(r"####?", text)
    return after[-1].strip() if after else (before.strip().splitlines() or [""])[-1].strip()


def value(text: str) -> Fraction | None:
    """The first number in a text: 1,080, 1 080, -.5, 3/4, 1 1/2, $18; None where there is none."""
    found = _NUMBER.search(_signs(text))
    if found is None or len(found[0]) > _LONGEST:
        return None
    sign, whole, number, over = found.groups()
    total = Fraction(re.sub("[, ]", "", number))
    if over is not None:
        if int(over) == 0:
            return None
        total /= int(over)
    total += int(whole or 0)
    return -total if sign else total


def _signs(text: str) -> str:
    """The text with one way to write a minus and a space."""
    return re.sub(r"\s", " ", re.sub("[\u2212\u2012\u2013]", "-", text))


def _words(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")
