# %% [markdown]
# # Wrap a model and train it
#
# A stack of attention layers sees earlier tokens, but each layer only through what lower layers made of them. A state
# carried over time hands what an *upper* layer of one token found to a *lower* layer of the next. Here is a task where
# that helps: say, at every token, which of five things is on top after all swaps so far.

# %%
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import undertow as ut

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The task
#
# Tokens 0..9 are swaps of two of five things, tokens 10..14 say which thing lies on top. The label of a token is the
# thing on top *after* its swap; labels are shifted inside the model, so every row alternates swap and answer.

# %%
PAIRS = [(a, b) for a in range(5) for b in range(a)]


def rows(count: int, swaps: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of swap, answer, swap, answer ...: `(count, 2 swaps)`."""
    moves = torch.randint(len(PAIRS), (count, swaps), generator=generator)
    found = torch.empty(count, 2 * swaps, dtype=torch.long)
    for row, chosen in enumerate(moves.tolist()):
        things = list(range(5))
        for i, move in enumerate(chosen):
            a, b = PAIRS[move]
            things[a], things[b] = things[b], things[a]
            found[row, 2 * i], found[row, 2 * i + 1] = move, 10 + things[0]
    return found


def labels(ids: torch.Tensor) -> torch.Tensor:
    """Only answers are to be predicted."""
    return torch.where(ids >= 10, ids, -100)


# %% [markdown]
# ## The model
#
# Any supported causal LM: here a small one with random weights, so that nothing is downloaded. `wrap` runs on its own
# tensors, and starts as it: the first assertion says so.

# %%
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=15,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
base = AutoModelForCausalLM.from_config(config)
sample = rows(2, 8, torch.Generator().manual_seed(1))
with torch.no_grad():
    before = base(sample).logits
    model = ut.wrap(base, time=ut.T2MLR(start=0, end=1))
    torch.testing.assert_close(model(sample, schedule=ut.Jacobi(0)).logits, before)

# %% [markdown]
# ## Training
#
# A plain loop: `model(ids, labels=...).loss` under the method's own schedule, cyclic sweeps with the adjoint gradient.

# %%
draws = torch.Generator().manual_seed(2)
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(60):
    ids = rows(32, 8, draws)
    loss = model(ids, labels=labels(ids)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    losses.append(loss.item())
    if step % 10 == 9:
        print(f"step {step + 1}: {sum(losses[-10:]) / 10:.3f} nats an answer")
assert losses[-1] < losses[0]

# %% [markdown]
# ## What is trained is what is decoded
#
# In evaluation the default schedule is `Converge()`: sweeps until the state stands still. `Sequential()` steps token by
# token. `generate` does that too, with a cache that holds keys, values and the state.

# %%
model.eval()
test = rows(64, 8, torch.Generator().manual_seed(3))
with torch.no_grad():
    swept, stepped = model(test), model(test, schedule=ut.Sequential())
print(f"{swept.passes:.1f} passes; logits differ by {(swept.logits - stepped.logits).abs().max():.1e}")
assert torch.allclose(swept.logits, stepped.logits, atol=1e-3)
answers = swept.logits[:, 0::2, 10:].argmax(-1) + 10
print(f"answers right: {(answers == test[:, 1::2]).float().mean():.2f} (chance 0.2)")
print(model.generate(test[:2, :7], max_new_tokens=1, do_sample=False)[:, 7])
