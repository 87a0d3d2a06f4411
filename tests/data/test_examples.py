"""Examples as tokens: labels in the model's convention, memory masks, padding at the left."""

import pytest
import torch

from tiny_tasks import Parity, Sums
from undertow.data import TextFormat, pad_left
from undertow.tasks import Example, Tags

IGNORED = -100


@pytest.mark.parametrize("loss", ["response", "all"])
@pytest.mark.parametrize("memory", ["response", "all"])
@pytest.mark.parametrize("prompt", ["the current = ", ""])
def test_an_example(tokenizer, loss, memory, prompt):
    encoded = TextFormat(tokenizer, loss, memory).example(Example(prompt, "surface"))
    given = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
    answer = [*tokenizer.encode("surface"), tokenizer.eos_token_id]
    assert encoded.ids == given + answer and encoded.prompt == len(given)
    targets = given if loss == "all" else [IGNORED] * len(given)
    assert encoded.labels == [IGNORED, *targets[1:], *answer]
    assert encoded.memory == [int(memory == "all")] * len(given) + [1] * len(answer)


def test_without_a_bos_an_empty_prompt_leaves_the_first_token_unpredicted():
    for loss in ("response", "all"):
        encoded = TextFormat(Parity().tokenizer(), loss, memory="response").example(Example("", "even odd"))
        assert encoded.ids == [3, 4, 0] and encoded.labels == [IGNORED, 4, 0] and encoded.prompt == 0


def test_tags_are_targets_of_their_own_tokens():
    encoded = TextFormat(Parity().tokenizer(), memory="response").example(Tags("1 0 1", "odd odd even", (0, 1, 1)))
    assert encoded.ids == [2, 1, 2, 0]
    # The model shifts: what position t-1 is to say stands at t.
    assert encoded.labels[1:] == [4, 4, 3] and encoded.labels[0] == IGNORED
    assert encoded.memory == [0, 1, 1, 1]
    assert TextFormat(Parity().tokenizer(), memory="all").example(Tags("1", "odd", (0,))).memory == [1, 1]
    with pytest.raises(ValueError, match="input has 2 tokens, target 1, memory 2"):
        TextFormat(Parity().tokenizer(), memory="response").example(Tags("1 0", "odd", (0, 1)))


def test_a_text_that_spells_out_a_special_token_does_not_end_there(tokenizer):
    encoded = TextFormat(tokenizer, memory="response").example(Example("a", tokenizer.eos_token))
    assert encoded.ids.count(tokenizer.eos_token_id) == 2, "bos and eos, which are one token here, and no third"


def test_padding_at_the_left():
    batch = pad_left([[5, 6, 7], [8], [9, 10]], 0, memory=[[0, 0, 1], [0], [1, 0]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["memory_mask"].tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert set(pad_left([[1]], 0)) == {"input_ids", "attention_mask"}


def test_what_is_generated_from_is_what_is_trained_on(tokenizer):
    task = Sums()
    for record in task.records("test"):
        form, example = TextFormat(tokenizer, memory="response"), task.example(record)
        encoded = form.example(example)
        assert form.begin(example.prompt).ids == encoded.ids[: encoded.prompt]
        assert task.correct(record, tokenizer.decode(encoded.ids[encoded.prompt : -1]))
