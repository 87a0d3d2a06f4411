# %% [markdown]
# # Looped depth, and looking inside
#
# The same layers may run several times for a token. This trains a small model whose two middle layers run three times,
# then asks: what does each round change, what would it say, and when has a token had enough?

# %%
import argparse
from pathlib import Path

import torch
from transformers import GPT2Config

import undertow as ut
from undertow.analysis.recursion import rounds

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# The text: the bytes of one module of the standard library.

# %%
text = torch.tensor(list(Path(argparse.__file__).read_bytes()))


def rows(count: int, generator: torch.Generator, length: int = 48) -> torch.Tensor:
    """Pieces of the text, `(count, length)`."""
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts])


config = GPT2Config(
    n_embd=64, n_layer=4, n_head=4, vocab_size=256, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = ut.from_scratch(config, depth=ut.MiddleLoop(1, 2, times=3, inject=True))
draws, optimiser = torch.Generator().manual_seed(1), torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(120):
    ids = rows(16, draws)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    losses.append(loss.item())
    if step % 40 == 39:
        print(f"step {step + 1}: {loss.item():.3f} nats a byte")
assert losses[-1] < losses[0] - 1

# %% [markdown]
# ## Rounds
#
# `rounds` watches one forward: how large the state is after each round, and how much of it the round changed.

# %%
model.eval()
test = rows(32, torch.Generator().manual_seed(2))
for number, seen in enumerate(rounds(model, test, loops=6), 1):
    moved = "" if seen.change is None else f", moved by {seen.change:.2f} of itself"
    print(f"round {number}: size {next(iter(seen.norms.values())):.1f}{moved}")

# %% [markdown]
# ## What each number of rounds says
#
# `loops=n` runs n rounds with the same weights: fewer than trained, as many, more. Reading out after n rounds is a
# logit lens for loops.

# %%
prompt = torch.tensor([list(b"    def __init__(sel")])
with torch.no_grad():
    for loops in (1, 2, 3, 4, 6):
        nats = model(test, labels=test, loops=loops).loss.item()
        best = model(prompt, loops=loops).logits[0, -1].softmax(-1).topk(3)
        said = ", ".join(
            f"{chr(i)!r} {p:.2f}" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"loops={loops}{' (trained)' if loops == 3 else ''}: {nats:.3f} nats a byte; next byte {said}")

# %% [markdown]
# ## Enough is enough
#
# An exit rule ends the loop token by token: here where a round changes the state by less than a given share.

# %%
with torch.no_grad():
    for threshold in (0.5, 0.2, 0.05):
        out = model(test[:8], loops=6, exit_rule=ut.Exit("change", threshold))
        print(f"change below {threshold}: {out.rounds.float().mean():.2f} rounds a token")
    whole = model(test[:8], loops=6)
    never = model(test[:8], loops=6, exit_rule=ut.Exit("change", 0.0))
assert torch.allclose(whole.logits, never.logits, atol=1e-3)
assert bool((never.rounds == 6).all())
