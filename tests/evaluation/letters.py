"""A tokenizer of letters and a few pairs of them, few enough for a tiny model; and such a model."""

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models import V, build

END = "<end>"
PAIRS = [(" ", "t"), ("e", "n"), ("a", "b")]  # the first joins a context to its continuation


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    letters = [*"abcdefghijklmnopqrstuvwxyz .?\n|"]
    tokens = [END, *letters, *("".join(pair) for pair in PAIRS)]
    assert len(tokens) <= V
    model = BPE({token: i for i, token in enumerate(tokens)}, PAIRS)
    made = Tokenizer(model)
    made.decoder = decoders.Fuse()
    ends = {"eos_token": END} | ({"bos_token": END} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **ends)


def recurrent(time=None, depth=None):
    """Two layers whose weights are large: its texts are varied and its memory decides what they are."""
    model = build("llama", depth=depth, time=time, seed=1, num_hidden_layers=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    return model
