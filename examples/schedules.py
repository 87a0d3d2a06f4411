# %% [markdown]
# # Schedules against the true recurrence
#
# A model that carries a state over time is a recurrence: T steps, one after the other. A *schedule* computes many
# positions at once, several times. How near does it come, in state and in gradient, and at what cost?

# %%
import torch
from transformers import GPT2Config

import undertow as ut
from undertow.analysis import label

torch.manual_seed(0)
torch.set_num_threads(1)
T = 96

# %% [markdown]
# A small model in float64, so that rounding does not hide anything. A fresh mixer is closed; its gate is opened here,
# so that the state matters.

# %%
config = GPT2Config(
    n_embd=32, n_layer=4, n_head=4, vocab_size=64, n_positions=T, initializer_range=0.15, attn_pdrop=0.0,
    resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = ut.from_scratch(config, time=ut.T2MLR(start=1, end=2)).double()
with torch.no_grad():
    model.undertow["memory_mixer"].scale_m.fill_(1.5)
ids = torch.randint(64, (1, T))
parameters = list(model.parameters())


def look(schedule: ut.Schedule) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The memory, the gradient of the loss, and the passes of the span."""
    out = model(ids, labels=ids, schedule=schedule)
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return out.memory.detach(), torch.cat([g.flatten() for g in found if g is not None]), out.passes


# %% [markdown]
# `Sequential()` is the definition, and backpropagation through it the true gradient.

# %%
true_memory, true_gradient, _ = look(ut.Sequential())
schedules = [
    ut.Jacobi(1), ut.Jacobi(3), ut.Jacobi(7), ut.Interleaved(2), ut.Interleaved(8), ut.Cyclic(8, 1), ut.Cyclic(8, 3),
    ut.Cyclic(8, 3, adjoint=4), ut.Cyclic(8, 3, adjoint=8), ut.Cyclic(32, 2), ut.Converge(1e-8),
]  # fmt: skip
errors = {}
print(f"{'schedule':34} passes   memory  gradient")
for schedule in schedules:
    memory, gradient, passes = look(schedule)
    state = float((memory - true_memory).norm() / true_memory.norm())
    slope = float((gradient - true_gradient).norm() / true_gradient.norm())
    errors[label(schedule)] = state, slope
    print(f"{label(schedule):34} {passes:6.2f}  {state:.1e}   {slope:.1e}")

# %% [markdown]
# What to see:
#
# - `Jacobi` loses about half of its error a pass; a round of `Cyclic` over eight subsets, at the same cost, far more.
# - `Interleaved` is one round with the losses of all its sweeps averaged: its gradient is far from the true one.
# - `adjoint=k` runs one live pass and k vector-Jacobian products; its gradient nears the true one as k grows, at the
#   memory of one pass.
# - `Converge` stops by itself.

# %%
assert errors[label(ut.Cyclic(8, 3))][0] < errors[label(ut.Jacobi(3))][0]
assert errors[label(ut.Cyclic(8, 3, adjoint=8))][1] < errors[label(ut.Cyclic(8, 3, adjoint=4))][1]
assert errors[label(ut.Converge(1e-8))][0] < 1e-6
