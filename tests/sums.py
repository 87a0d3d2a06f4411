"""A tiny task, and a tokenizer of 43 characters in which a digit has id 0, as the tiny models have 43 tokens."""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from undertow.tasks import Example, Generated, Tags

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+= \n|"
END = "<end>"


def tokenizer(end: int = 42) -> PreTrainedTokenizerFast:
    """One token a character; `end` is the id of the end token (another token takes the last id)."""
    tokens = [*CHARACTERS, "<unknown>", END]
    tokens[end], tokens[-1] = tokens[-1], tokens[end]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Sums(Generated):
    """`12+7=` is to be followed by `19`; the bucket is the digits of the larger number."""

    train: int = 20
    validation: int = 5
    test: int = 6
    answers: tuple[tuple[str, str], ...] = ()  # prompt (or input), and what is to be written instead

    def draw(self, rng: random.Random, split: str):
        return {"a": rng.randrange(10 ** rng.randint(1, 3)), "b": rng.randrange(100)}

    def example(self, record) -> Example:
        prompt = f"{record['a']}+{record['b']}="
        response = dict(self.answers).get(prompt, str(record["a"] + record["b"]))
        return Example(prompt, response, f"{len(str(record['a']))} digits")

    def correct(self, record, text: str) -> bool:
        return text == self.example(record).response


@dataclass(frozen=True)
class Tagged(Sums):
    """The tag of every digit is its parity, `e` or `o`; the first token takes in no memory."""

    kind = "tags"

    def example(self, record) -> Tags:
        text = f"{record['a']}{record['b']}"
        tags = "".join("eo"[int(digit) % 2] for digit in text)
        return Tags(text, dict(self.answers).get(text, tags), (0, *[1] * (len(text) - 1)), f"{len(text)} digits")
