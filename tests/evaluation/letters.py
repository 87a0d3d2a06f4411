"""A tokenizer of letters and a few pairs, few enough for a tiny model; such a model; and its scores written out."""

from types import SimpleNamespace

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


TOK = tokenizer()
BOS = TOK.eos_token_id


def encode(text):
    return TOK(text, add_special_tokens=False)["input_ids"]


def log_p(model, ids, new, schedule=None):
    """`log p` of the last `new` tokens, written out; one text, no mask."""
    logits = model(torch.tensor([ids]), schedule=schedule, use_cache=False).logits[0].log_softmax(-1)
    return [logits[t - 1, ids[t]].item() for t in range(len(ids) - new, len(ids))]


def go_on(model, prompt, count, stops, schedule=None):
    """Greedy decoding that reads everything anew for each token."""
    ids = [BOS, *encode(prompt)]
    given = len(ids)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]), schedule=schedule, use_cache=False).logits[0, -1].argmax().item())
        text = TOK.decode(ids[given:], skip_special_tokens=True)
        if ids[-1] == TOK.eos_token_id or any(stop in text for stop in stops):
            break
    return text[: min(text.find(stop) if stop in text else len(text) for stop in stops)]


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]
