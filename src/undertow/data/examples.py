"""A task's examples as tokens: the same for training rows, for scoring and for generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from undertow.data.packing import IGNORED
from undertow.tasks.base import Example, Tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One example as tokens; the lists have one entry a token.

    Attributes:
        ids: bos (where the tokenizer has one), prompt, response, eos; of tags the input and eos.
        labels: in the model's convention, `labels[t]` is the target of position t-1; -100 where there is none.
        memory: 1 where the token takes in the memory of the one before it (T2MLR's control flow 2), 0 where not.
        prompt: how many tokens are given when the response is generated.
    """

    ids: list[int]
    labels: list[int]
    memory: list[int]
    prompt: int


@dataclass(frozen=True)
class Encoder:
    """Examples -> tokens.

    Args:
        tokenizer: with an eos token. Where it has a chat template, the prompt is the user's turn of a chat.
        loss: `response`: the prompt is not to be predicted; `all`: every token is. Tags are all targets.
        memory: `response`: the prompt takes in no memory; `all`: every token does.
    """

    tokenizer: PreTrainedTokenizerBase
    loss: Literal["response", "all"] = "response"
    memory: Literal["response", "all"] = "response"

    def __call__(self, example: Example | Tags) -> Encoded:
        """Raises ValueError (one line): the input and the target of tags differ in tokens."""
        if isinstance(example, Tags):
            return self._tags(example)
        prompt = self.prompt(example)
        response = [*self._plain(example.response), self.tokenizer.eos_token_id]
        given = [IGNORED] * len(prompt) if self.loss == "response" else [IGNORED, *prompt[1:]]
        return Encoded(
            ids=[*prompt, *response],
            labels=[*given, *response],
            memory=[*self.given_memory(prompt), *[1] * len(response)],
            prompt=len(prompt),
        )

    def prompt(self, example: Example) -> list[int]:
        """The tokens that are given when the response is generated."""
        if getattr(self.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": example.prompt.rstrip()}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        before = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return [*before, *self._plain(example.prompt)]

    def given_memory(self, prompt: list[int]) -> list[int]:
        """The memory mask of a prompt's tokens."""
        return [int(self.memory == "all")] * len(prompt)

    def _tags(self, tags: Tags) -> Encoded:
        ids, target = self._plain(tags.input), self._plain(tags.target)
        if not len(ids) == len(target) == len(tags.memory):
            raise ValueError(
                f"tags: input has {len(ids)} tokens, target {len(target)}, memory {len(tags.memory)}: must be equal"
            )
        memory = list(tags.memory) if self.memory == "response" else [1] * len(ids)
        return Encoded([*ids, self.tokenizer.eos_token_id], [IGNORED, *target], [*memory, 1], len(ids))

    def _plain(self, text: str) -> list[int]:
        # A text that spells out a special token does not become one.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
