"""A tokenizer of letters and a few pairs of them, small enough for the tiny models; and a model whose memory matters."""

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import undertow as ut
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


def recurrent(time=None, **config):
    return build("llama", time=time or ut.LRT(2), **config)
