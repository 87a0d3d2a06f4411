"""GSM8K (arXiv 2110.14168) and GSM8K-aug (arXiv 2311.01460): grade-school word problems, solved in steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from undertow.tasks.base import Example, Record
from undertow.tasks.loaded import Loaded

_FORMULA = re.compile(r"<<.*?>>")


@dataclass(frozen=True)
class GSM8K(Loaded):
    """Grade-school word problems, solved in steps: GSM8K and GSM8K-aug.

    A record is `{question, steps, answer}`; files may also be in the first publication's form, in which `answer` holds
    the steps, a line each, and after `####` the answer. The prompt is the question; the response is the steps, a line
    each, and `### answer` (as T2MLR trains on it).

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

    def parsed(self, record: Record) -> Record:
        if record.get("steps") is not None:
            steps, answer = [str(step) for step in record["steps"]], str(record["answer"])
            if steps and not self._written(steps):  # the first publication has a few without any formula
                raise ValueError(f"steps={self.steps!r}: none of its steps holds such ({steps[0]!r})")
        else:
            solution, mark, answer = record["answer"].rpartition("####")
            if not mark:
                raise ValueError(f"neither steps nor '####' in its answer ({record['answer'][:60]!r})")
            steps = solution.strip().splitlines()
        return {"question": record["question"].strip(), "steps": steps, "answer": answer.strip()}

    def example(self, record: Record) -> Example:
        count = len(record["steps"])
        return Example(
            prompt=f"{record['question']}\n\n",
            response="\n".join([*self._written(record["steps"]), f"### {record['answer']}"]),
            bucket=f"{count} step{'s' * (count != 1)}",
        )

    def correct(self, record: Record, text: str) -> bool:
        return _plain(final(text)) == _plain(record["answer"])

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


def _plain(number: str) -> str:
    return number.replace(",", "").strip().removesuffix(".")
