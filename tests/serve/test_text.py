"""Text that is handed out while it is written: stop strings, special tokens among them."""

import random

import pytest
from served import byte_tokenizer

from undertow.serve.text import Text

SPECIAL = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def written(tokenizer, ids, stop=(), last=None):
    """(pieces, whether a stop string came, how many tokens were taken)."""
    text, pieces = Text(tokenizer, stop), []
    for n, token in enumerate(ids, 1):
        pieces.append(text.add(token))
        if text.stopped:
            return pieces, True, n
    pieces.append(text.end(last))
    return pieces, text.stopped, len(ids)


@pytest.mark.parametrize(
    ("said", "stop", "shown", "taken"),
    [
        ("good day<|im_end|>\nuser", ["<|im_end|>"], "good day", "good day<|im_end|>"),
        ("good day<|im_end|>\nuser", ["<|im_end|>\n"], "good day", "good day<|im_end|>\n"),
        ("good day<|im_end|>\nuser", ["day<|im_end|>\nu"], "good ", "good day<|im_end|>\nu"),
        ("a<|im_end|><|im_start|><|im_end|>b", ["<|im_start|><|im_end|>"], "a", "a<|im_end|><|im_start|><|im_end|>"),
        ("a<|im_end|><|im_end|>b", ["<|im_end|><|im_end|>"], "a", "a<|im_end|><|im_end|>"),
        ("a<|im_end|>b<|im_end|>c", ["bc"], "a", "a<|im_end|>b<|im_end|>c"),  # as it is shown
        ("a<|im_end|>b", ["<|im_start|>"], "ab", None),
        ("a<|im_end|>b", ["|"], "ab", None),  # in no letter that is shown
        ("a<|im_end|>b", ["im_end|>b"], "ab", None),  # a special token is one letter
        ("a<|im_end|", ["<|im_end|>"], "a<|im_end|", None),  # held back, and not a stop string after all
        ("grüße, 世界 🎉 ok<|im_end|>!", ["<|im_end|>"], "grüße, 世界 🎉 ok", "grüße, 世界 🎉 ok<|im_end|>"),
        ("grüße, 世界 🎉 ok", ["界 🎉"], "grüße, 世", "grüße, 世界 🎉"),
        ("ab<|im_end|>", ["nothing", "<|im_end|>", "b"], "a", "ab"),
    ],
)
def test_a_stop_string_may_be_special(tokenizer, said, stop, shown, taken):
    ids = tokenizer(said)["input_ids"]
    pieces, stopped, n = written(tokenizer, ids, stop)
    assert "".join(pieces) == shown and stopped == (taken is not None)
    assert n == len(tokenizer(taken or said)["input_ids"])
    assert all("\ufffd" not in piece for piece in pieces)


def test_the_token_that_ends_a_text_may_end_a_stop_string(tokenizer):
    ids = tokenizer("that is all")["input_ids"]
    end = tokenizer.eos_token_id
    for stop, shown in (("<|endoftext|>", "that is all"), (" all<|endoftext|>", "that is"), ("<|im_end|>", None)):
        pieces, stopped, _ = written(tokenizer, ids, [stop], last=end)
        assert "".join(pieces) == (shown or "that is all") and stopped == (shown is not None)


def test_a_special_token_in_a_character_that_is_not_finished(tokenizer):
    first, *others = tokenizer("世")["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [first, special, *others]
    assert "".join(written(tokenizer, ids)[0]) == "世"  # as `decode` has it
    assert "".join(written(tokenizer, ids, ["never"])[0]) == "世"
    assert "".join(written(tokenizer, ids, ["世<|im_end|>"])[0]) == ""
    assert written(tokenizer, ids, ["<|im_end|>"])[1:] == (True, 2)


def test_drawn_texts_stop_where_the_definition_says(tokenizer):
    """Every letter and special token drawn, every stop string cut out of such a text: against a search of all of it."""
    rng = random.Random(0)
    letters = [*"ab|<", *SPECIAL]
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in letters}
    stops = 0
    for _ in range(400):
        said = rng.choices(letters, k=12)
        stop = ["".join(rng.choices(letters, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 2))]
        shown, taken = defined(said, stop)
        pieces, stopped, n = written(tokenizer, [ids[letter] for letter in said], stop)
        assert ("".join(pieces), n if stopped else None) == (shown, taken), (said, stop)
        stops += stopped
    assert 100 < stops < 390


def defined(said, stop):
    """What is shown and how many tokens are taken: after every token, all readings of all that was said so far."""
    hidden = set(SPECIAL)
    for n in range(1, len(said) + 1):
        found = []
        for kept in (range(n), [i for i in range(n) if said[i] not in hidden]):
            for a in range(len(kept)):
                for b in range(a + 1, len(kept) + 1):
                    if "".join(said[i] for i in kept[a:b]) in stop:
                        found.append(kept[a])
        if found:
            return "".join(letter for letter in said[: min(found)] if letter not in hidden), n
    return "".join(letter for letter in said if letter not in hidden), None


def test_without_a_stop_string_it_is_what_decode_says(tokenizer):
    rng = random.Random(1)
    for _ in range(50):
        ids = rng.choices(range(1, len(tokenizer)), k=30) + tokenizer("ü世🎉")["input_ids"]
        rng.shuffle(ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(written(tokenizer, ids)[0]) == whole
        assert "".join(written(tokenizer, ids, ["never said"])[0]) == whole
