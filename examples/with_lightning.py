# %% [markdown]
# # Lightning
#
# A recurrent model in a `LightningModule`: the loss comes out of the model through `labels`, nothing else is special.
# Needs `pip install lightning`.

# %%
import lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig

import undertow as ut

lightning.seed_everything(0, verbose=False)
torch.set_num_threads(1)

# %% [markdown]
# ## The task
#
# Running parity: after each bit the model says whether the number of ones so far is odd. Tokens 0 and 1 are the bits, 2
# and 3 the answers. A state that is carried from token to token is all that it takes.

# %%
bits = torch.randint(2, (1536, 12))
answers = bits.cumsum(1) % 2 + 2
rows = torch.stack([bits, answers], -1).flatten(1)  # bit, answer, bit, answer, ...
labels = torch.stack([torch.full_like(bits, -100), answers], -1).flatten(1)  # the loss is on the answers alone
data = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]


# %% [markdown]
# ## The module


# %%
class Recurrent(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=4,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model = ut.from_scratch(config, time=ut.T2MLR(start=0, end=1))

    def training_step(self, batch, index):
        loss = self.model(**batch).loss  # in training the method's own schedule, Cyclic(8, 3, adjoint=4)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


# %% [markdown]
# ## Training
#
# Lightning does the rest: devices, precision, checkpoints, logging.

# %%
module = Recurrent()
batch = next(iter(DataLoader(data, batch_size=256)))
with torch.no_grad():
    before = float(module.model.train()(**batch).loss)
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))

# %% [markdown]
# ## What it learned
#
# In evaluation the model runs the exact recurrence.

# %%
with torch.no_grad():
    out = module.model.eval()(**batch)
print(f"loss {before:.3f} before, {float(out.loss):.3f} after; guessing gives {torch.tensor(2.0).log():.3f}")
assert out.loss < before
