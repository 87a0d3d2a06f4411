"""What the tests of the server share: a tiny model with a byte tokenizer, and requests."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import undertow as ut
from models import randomise

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = "<|endoftext|>"


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token; 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([END, *alphabet])}, merges=[]))
    made.add_special_tokens([END])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, bos_token=END, pad_token=END, chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny(depth=None, time=None, dtype=torch.float64, positions: int = 256) -> ut.UndertowForCausalLM:
    """Random weights over the bytes; what it writes is noise, and ends at random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=257, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return randomise(ut.from_scratch(config, depth=depth, time=time), 0).to(dtype).eval()


def completed(client, status=200, path="completions", **body):
    reply = client.post(f"/v1/{path}", json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def chatted(client, *messages, status=200, **body):
    said = [{"role": role, "content": text} for role, text in messages]
    return completed(client, status, "chat/completions", messages=said, **body)


def events(client, path="completions", **body):
    """The events of a stream, whose end is checked."""
    reply = client.post(f"/v1/{path}", json=body)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
    blocks = reply.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
