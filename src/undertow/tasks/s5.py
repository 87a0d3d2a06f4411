"""State tracking in S5, alone or with the lookup of a value (T2MLR, arXiv 2607.15178).

Actions a_1..a_n are permutations of five things; the state after i of them is s_i[j] = s_{i-1}[a_i[j]], s_0 the
identity. Every token of the input has a target: that of an action is the state after it.

tracking    `<A_21345><A_13245>`                            -> `<A_21345><A_23145>`
retrieval   `<A_23145>x7<A_21345>Qq|<A_21345>  <A_13245>  ` -> `<A_23145>x7<A_21345>Qq|<A_21345>Qq<A_23145>x7`
"""

from __future__ import annotations

import random
import string
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import TYPE_CHECKING, ClassVar, Literal

from undertow.tasks.base import Generated, Kind, Record, Tags
from undertow.tasks.options import Range, check_choice, check_range, check_whole, pick

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PERMUTATIONS = ["".join(p) for p in permutations("12345")]  # in lexical order: the identity is number 0
TOKENS = [f"<A_{p}>" for p in PERMUTATIONS]
ALPHABET = string.ascii_letters + string.digits  # of the values
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")


@dataclass(frozen=True)
class S5(Generated):
    """S5 state tracking and retrieval. Records have the published fields.

    Args:
        actions: how many actions training problems have.
        validation_actions: the same of validation; None: as in training.
        test_actions: the same of the test; longer than in training, it shows what generalises.
        moves: how many different actions there are. Below 120 they are the swap of the first two things, the rotation
            of all five (these two reach every permutation) and then others in lexical order: the same task on a
            smaller table of products, for small models.
        retrieval: a dictionary from permutations to values goes before the actions, and `value_len` spaces after each
            of them, whose targets are the value. False: no dictionary, the states are all there is.
        by: a value is looked up by the `state` after the action, as the paper says, or by the `action` itself, as in
            the released generator (then no lookup needs the state).
        value_len: letters and digits of a value (the published runs have 4).
        dict_size: entries of the dictionary; never fewer than are looked up. None: as many as there are actions, which
            by state nearly tells the states of a short problem; `full_dict` does not.
        full_dict: all 120 permutations are in the dictionary.
        key_token: the key is written once more after its action. By action only: the state would be given away.
    """

    kind: ClassVar[Kind] = "tags"

    actions: Range = (1, 32)
    validation_actions: Range | None = None
    test_actions: Range = (1, 48)
    moves: int = 120
    retrieval: bool = False
    by: Literal["state", "action"] = "state"
    value_len: int = 1
    dict_size: int | None = None
    full_dict: bool = False
    key_token: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("actions", "validation_actions", "test_actions"):
            if getattr(self, name) is not None:
                check_range(self, name, least=1)
        check_whole(self, "moves", least=2, most=len(PERMUTATIONS))
        for name in ("retrieval", "full_dict", "key_token"):
            check_choice(self, name, (True, False))
        check_choice(self, "by", ("state", "action"))
        check_whole(self, "value_len", least=1)
        if self.dict_size is not None:
            check_whole(self, "dict_size", least=1, most=len(PERMUTATIONS))
        for name in ("dict_size", "full_dict", "key_token"):
            if getattr(self, name) and not self.retrieval:
                raise ValueError(f"S5 {name}={getattr(self, name)}: needs retrieval=True (there is no dictionary)")
        if self.key_token and self.by == "state":
            raise ValueError("S5 key_token=True: needs by='action' (by='state' the key is what is to be found)")

    def draw(self, rng: random.Random, split: str) -> Record:
        ranges = {"validation": self.validation_actions, "test": self.test_actions}
        count = pick(rng, ranges.get(split) or self.actions)
        actions = rng.choices(_moves(self.moves), k=count)
        states = track(actions)
        pairs = self._dictionary(rng, actions, states)
        if self.retrieval:
            values = dict(pairs)
            blank = " " * self.value_len
            keys = [TOKENS[a] if self.key_token else "" for a in actions]
            found = [values[k] for k in (states if self.by == "state" else actions)]
            head = "".join([TOKENS[key] + value for key, value in pairs]) + "|"
        else:
            blank, head = "", ""
            keys = found = [""] * count
        action_tokens, state_tokens = [TOKENS[a] for a in actions], [TOKENS[s] for s in states]
        per_step = 1 + bool(self.key_token) + len(blank)
        given = len(pairs) * (1 + self.value_len) + len("|") if self.retrieval else 0
        action_names, state_names = [PERMUTATIONS[a] for a in actions], [PERMUTATIONS[s] for s in states]
        return {
            "input": head + "".join([a + k + blank for a, k in zip(action_tokens, keys, strict=True)]),
            "target": head + "".join([s + k + v for s, k, v in zip(state_tokens, keys, found, strict=True)]),
            "control_flow": [1] * given + [2] * (per_step * count),
            "length": [count, len(pairs), 5],
            "attributes": {
                "num_actions": count,
                "dict_size": len(pairs),
                "value_len": len(blank),
                "include_key_token": self.key_token,
                "disable_retrieval": not self.retrieval,
                "by": self.by,
                "actions": action_names,
                "action_tokens": action_tokens,
                "states": state_names,
                "state_tokens": state_tokens,
                "dict_pairs": [[PERMUTATIONS[key], value] for key, value in pairs],
                "target_pairs": [list(step) for step in zip(action_names, state_names, found, strict=True)],
            },
        }

    def _dictionary(self, rng: random.Random, actions: list[int], states: list[int]) -> list[tuple[int, str]]:
        """The entries in the order they are written: all that is looked up, filled up with others."""
        if not self.retrieval:
            return []
        needed = dict.fromkeys(states if self.by == "state" else actions)
        every = len(TOKENS)
        wanted = every if self.full_dict else min(self.dict_size or len(actions), every)
        others = [p for p in range(every) if p not in needed]
        keys = [*needed, *rng.sample(others, max(0, wanted - len(needed)))]
        rng.shuffle(keys)
        length = self.value_len
        letters = "".join(rng.choices(ALPHABET, k=length * len(keys)))
        return [(key, letters[i * length : (i + 1) * length]) for i, key in enumerate(keys)]

    def example(self, record: Record) -> Tags:
        return Tags(
            input=record["input"],
            target=record["target"],
            memory=tuple([int(flow > 1) for flow in record["control_flow"]]),
            bucket=f"{record['length'][0]} actions",
        )

    def correct(self, record: Record, text: str) -> bool:
        """All positions are right, the copy of the dictionary among them."""
        return text == record["target"]

    def key(self, record: Record) -> Hashable:
        """The actions in order and the dictionary in any order."""
        attributes = record["attributes"]
        return tuple(attributes["actions"]), tuple(sorted(map(tuple, attributes["dict_pairs"])))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The published 188 tokens in their order: 4 special ones, letters, digits, space, `|`, 120 permutations."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET, " ", "|", *TOKENS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<A_[1-5]{5}>|[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            bos_token="<bos>",
            eos_token="<eos>",
            clean_up_tokenization_spaces=False,  # spaces are tokens here
        )


def track(actions: list[int]) -> list[int]:
    """The state after each action; both are numbers of permutations in `PERMUTATIONS`."""
    table, state, states = _products(), 0, []
    for action in actions:
        state = table[state][action]
        states.append(state)
    return states


@cache
def _moves(count: int) -> list[int]:
    """The actions that problems are made of: the first two generate the group."""
    first = [PERMUTATIONS.index("21345"), PERMUTATIONS.index("23451")]
    every = range(len(PERMUTATIONS))
    return list(every) if count == len(every) else [*first, *[p for p in every if p not in first]][:count]


@cache
def _products() -> list[list[int]]:
    """[s][a]: the state after action a in state s."""
    number = {p: i for i, p in enumerate(PERMUTATIONS)}
    return [[number["".join([s[int(j) - 1] for j in a])] for a in PERMUTATIONS] for s in PERMUTATIONS]
