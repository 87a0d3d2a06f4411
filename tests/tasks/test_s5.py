"""S5: the group's laws, what is looked up, the tokens."""

import string
from itertools import islice, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.data.format import TextFormat
from undertow.tasks.s5 import PERMUTATIONS, S5, TOKENS, track

numbers = st.integers(0, 119)


def apply(state: str, action: str) -> str:
    """The definition: s_i[j] = s_{i-1}[a_i[j]]."""
    return "".join(state[int(j) - 1] for j in action)


def product(*actions: int) -> int:
    return track(list(actions))[-1]


@settings(deadline=None)
@given(st.lists(numbers, max_size=60))
def test_states_follow_the_definition(actions):
    state, expected = "12345", []
    for action in actions:
        state = apply(state, PERMUTATIONS[action])
        expected.append(state)
    assert [PERMUTATIONS[s] for s in track(actions)] == expected


@settings(deadline=None)
@given(numbers, numbers, numbers)
def test_the_product_is_associative(a, b, c):
    assert product(product(a, b), c) == product(a, product(b, c))


@settings(deadline=None)
@given(numbers)
def test_identity_and_inverse(a):
    identity = PERMUTATIONS.index("12345")
    assert product(a, identity) == product(identity, a) == a
    inverses = [b for b in range(120) if product(a, b) == identity]
    assert len(inverses) == 1
    assert product(inverses[0], a) == identity


def test_it_is_not_commutative():
    assert any(product(a, b) != product(b, a) for a in range(5) for b in range(5))


def steps(record):
    """(action, state, value) as read off the texts, and the dictionary."""
    attributes = record["attributes"]
    width = attributes["value_len"]
    head, _, tail = record["target"].rpartition("|")
    dictionary = {head[i + 3 : i + 8]: head[i + 9 : i + 9 + width] for i in range(0, len(head), 9 + width)}
    size = len(tail) // attributes["num_actions"]
    given = record["input"].rpartition("|")[2]
    blocks = [(given[i : i + size], tail[i : i + size]) for i in range(0, len(tail), size)]
    return [(a[3:8], b[3:8], b[size - width :]) for a, b in blocks], dictionary


@pytest.mark.parametrize("options", [{}, {"dict_size": 3}, {"dict_size": 100}, {"full_dict": True}])
@pytest.mark.parametrize("by", ["state", "action"])
def test_values_are_looked_up_by_state_or_by_action(by, options):
    """The released generator looks up by the action, so that its retrieval needs no state."""
    told_apart = 0
    for record in S5(retrieval=True, by=by, value_len=2, test=40, **options).records("test"):
        found, dictionary = steps(record)
        states = [PERMUTATIONS[s] for s in track([PERMUTATIONS.index(action) for action, _, _ in found])]
        assert [state for _, state, _ in found] == states == record["attributes"]["states"]
        for action, state, value in found:
            assert value == dictionary[state if by == "state" else action]
            told_apart += dictionary.get(action) != dictionary.get(state)
        used = {state if by == "state" else action for action, state, _ in found}
        wanted = 120 if options.get("full_dict") else options.get("dict_size", len(found))
        assert len(dictionary) == record["length"][1] == max(wanted, len(used))
        assert [list(pair) for pair in dictionary.items()] == record["attributes"]["dict_pairs"]
    assert told_apart > 40


def test_more_actions_than_permutations_do_not_run_forever():
    """The released generator draws keys until there are as many as actions, of which there may be more than 120."""
    record = next(S5(retrieval=True, by="action", test_actions=150).records("test"))
    assert record["length"] == [150, 120, 5]


def test_published_form():
    record = next(S5(retrieval=True, by="action", value_len=2, test_actions=2, seed=3).records("test"))
    attributes = record["attributes"]
    (a, b), (s, t) = attributes["action_tokens"], attributes["state_tokens"]
    values = dict(attributes["dict_pairs"])
    va, vb = (values[action] for action in attributes["actions"])
    head = "".join(f"<A_{key}>{value}" for key, value in attributes["dict_pairs"])
    assert record["input"] == f"{head}|{a}  {b}  "
    assert record["target"] == f"{head}|{s}{va}{t}{vb}"
    assert record["control_flow"] == [1] * (2 * 3 + 1) + [2] * (2 * 3)
    assert set(record) == {"input", "target", "control_flow", "length", "attributes"}


def test_an_explicit_key_is_copied():
    record = next(S5(retrieval=True, by="action", key_token=True, test_actions=1).records("test"))
    (action,), (state,) = record["attributes"]["action_tokens"], record["attributes"]["state_tokens"]
    assert record["input"].endswith(f"|{action}{action} ")
    assert record["target"].rpartition("|")[2].startswith(f"{state}{action}")


def test_tracking_has_no_dictionary_and_all_memory():
    record = next(S5(test_actions=4).records("test"))
    tags = S5().example(record)
    assert record["input"] == "".join(record["attributes"]["action_tokens"])
    assert record["target"] == "".join(record["attributes"]["state_tokens"])
    assert tags.memory == (1, 1, 1, 1)
    assert tags.bucket == "4 actions"


def test_memory_begins_after_the_dictionary():
    task = S5(retrieval=True, value_len=2)
    for record in islice(task.records("test"), 20):
        tags = task.example(record)
        ids = TextFormat(task.tokenizer(), memory="response").example(tags).ids
        border = ids.index(task.tokenizer().convert_tokens_to_ids("|"))
        assert tags.memory == (0,) * (border + 1) + (1,) * (len(ids) - 1 - border - 1)


def test_lengths_are_in_the_ranges():
    task = S5(train=200, validation=100, test=300, actions=(2, 4), validation_actions=5, test_actions=[1, 7])
    for split, lengths in (("train", {2, 3, 4}), ("validation", {5}), ("test", set(range(1, 8)))):
        assert {record["length"][0] for record in task.records(split)} == lengths
    unset = S5(validation=50, test=0, actions=(2, 3))
    assert {record["length"][0] for record in unset.records("validation")} == {2, 3}


def test_the_order_of_the_dictionary_is_no_other_problem():
    task = S5(retrieval=True, test_actions=3)
    record = next(task.records("test"))
    attributes = record["attributes"]
    swapped = {**record, "attributes": {**attributes, "dict_pairs": attributes["dict_pairs"][::-1]}}
    other = {**record, "attributes": {**attributes, "actions": attributes["actions"][::-1]}}
    assert task.key(swapped) == task.key(record) != task.key(other)


def test_one_wrong_position_is_wrong():
    task = S5(retrieval=True, value_len=1, test_actions=3)
    record = next(task.records("test"))
    target = record["target"]
    assert task.correct(record, target)
    assert not task.correct(record, target[:-1] + ("a" if target[-1] != "a" else "b"))
    assert not task.correct(record, ("<A_21345>" if not target.startswith("<A_21345>") else "<A_12345>") + target[9:])
    assert not task.correct(record, target[:-1])


def test_tokens_are_the_published_ones():
    tokenizer = S5().tokenizer()
    every = ["".join(p) for p in permutations("12345")]
    layout = ["<pad>", "<unk>", "<bos>", "<eos>", *string.ascii_letters, *string.digits, " ", "|"]
    layout += [f"<A_{p}>" for p in every]
    assert tokenizer.convert_ids_to_tokens(range(188)) == layout
    assert len(tokenizer) == 188
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2, 3)


TOKENIZER = S5().tokenizer()


@settings(deadline=None)
@given(st.lists(st.sampled_from([*TOKENS, *string.ascii_letters, *string.digits, " ", "|"])))
def test_tokens_keep_the_text(pieces):
    ids = TOKENIZER("".join(pieces), add_special_tokens=False)["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == pieces
    assert TOKENIZER.decode(ids) == "".join(pieces)


def test_the_tokenizer_can_be_saved(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    text = "<A_21345>x  9|<A_54321> "
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert read.decode(read(text)["input_ids"]) == text


def test_two_moves_reach_every_state():
    task = S5(actions=40, moves=2, train=200, validation=0, test=0)
    records = list(task.records("train"))
    assert {a for r in records for a in r["attributes"]["actions"]} == {"21345", "23451"}
    assert len({s for r in records for s in r["attributes"]["states"]}) == 120
    with pytest.raises(ValueError, match="moves=1"):
        S5(moves=1)
