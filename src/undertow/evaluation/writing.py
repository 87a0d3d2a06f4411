"""What a model writes after prompts, in left-padded batches, whatever the batch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from undertow.data.format import TextFormat, Tokens
from undertow.evaluation.batches import batches, most_positions
from undertow.training.precision import autocast


@torch.no_grad()
def write(
    model,
    form: TextFormat,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    batch_size: int = 16,
    precision: str = "float32",
    samples: int = 1,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[list[str]]:
    """The texts written after every prompt, in the order of the prompts; each ends before its own end token.

    One sample is greedy and depends on no other prompt. Several are drawn from the whole softmax; with the same seed
    and batch size they are the same again. A model with learned positions writes until they are used up (after a
    prompt that leaves no room: nothing).

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        form: gives the end token.
        prompts: as `TextFormat.begin` makes them, each of at least one token.
        max_new_tokens: at most this many, the end token included.
        batch_size: rows at a time; the samples of one prompt are written together.
        precision: `auto`, `float32` or `bfloat16`.
        temperature: above 0; unused where there is one sample.
        seed: of the draws; the global generator is left as it was.

    Raises:
        ValueError: a number out of its range, or a prompt without a token.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if samples > 1 and temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be above 0 where samples={samples} are drawn")
    if not all(map(len, prompts)):
        raise ValueError(f"prompt {next(i for i, p in enumerate(prompts) if not len(p))}: must hold at least one token")
    tokenizer, limit = form.tokenizer, most_positions(model)
    end = tokenizer.eos_token_id
    # Left at their defaults these would be what a pretrained model's own generation settings say.
    choice = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "do_sample": samples > 1}
    if samples > 1:
        choice |= {"num_return_sequences": samples, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    texts: list[list[str]] = [[""] * samples for _ in prompts]
    alone_above = None if limit is None else limit - max_new_tokens  # padding would take positions these need
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), autocast(precision, model.device):
        torch.manual_seed(seed)
        for rows in batches([len(prompt) for prompt in prompts], max(1, batch_size // samples), alone_above):
            given = [prompts[i] for i in rows]
            longest = max(map(len, given))
            new = max_new_tokens if limit is None else min(max_new_tokens, limit - longest)
            if new < 1:
                continue
            out = model.generate(
                **{name: x.to(model.device) for name, x in form.batch(given, new).items()},
                max_new_tokens=new,
                eos_token_id=end,
                pad_token_id=end,  # what follows a row's own end is cut off below
                **choice,
            )
            written = [decoded(tokenizer, row) for row in out[:, longest:].tolist()]
            for b, i in enumerate(rows):
                texts[i] = written[b * samples : (b + 1) * samples]
    return texts


def decoded(tokenizer, ids: list[int]) -> str:
    """The text of tokens up to their end token. Special tokens before it are kept: they were written."""
    end = tokenizer.eos_token_id
    kept = ids[: ids.index(end)] if end in ids else ids
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
