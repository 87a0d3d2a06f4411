# %% [markdown]
# # Reinforcement with a reward that can be checked
#
# TRL's `GRPOTrainer`, unmodified, on a model with a memory. The prompt is read as the backbone reads it; from the first
# token that the model writes itself, each token takes in the memory of the one before. Needs `pip install trl`.

# %%
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import undertow as ut

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The task
#
# `3 7 =` asks for the larger digit. The reward is 1 for the right token and 0 for any other: nothing else is told.

# %%
WORDS = [*map(str, range(10)), "=", "<end>"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>", padding_side="left")
problems = [{"prompt": f"{a} {b} =", "larger": str(max(a, b))} for a in range(4) for b in range(4)]


def reward(completions: list[str], larger: list[str], **columns) -> list[float]:
    """1 for each completion that is the larger digit."""
    return [float(said.strip() == wanted) for said, wanted in zip(completions, larger, strict=True)]


# %% [markdown]
# ## The model
#
# A hook says where the memory enters: after the sign `=`. It sees whole texts (prompt and completion, when they are
# scored, or the prompt alone). A single token that is being decoded is always the model's own, which is the default.

# %%
config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(WORDS),
    bos_token_id=None, eos_token_id=11, pad_token_id=11,
)  # fmt: skip
model = ut.from_scratch(config, time=ut.T2MLR(start=0, end=1))


def prompt_is_plain(module, args, kwargs):
    ids = kwargs["input_ids"]
    if ids.shape[1] > 1:
        asked = ids == WORDS.index("=")
        kwargs["memory_mask"] = (asked.cumsum(1) > 0) & ~asked
    return args, kwargs


model.register_forward_pre_hook(prompt_is_plain, with_kwargs=True)

# %% [markdown]
# ## Training
#
# TRL draws the completions, multiplies the model's last states by the LM head, and takes the gradient through the
# training schedule (here `Cyclic(8, 3, adjoint=4)`, the method's own), memory and all.

# %%
arguments = GRPOConfig(
    output_dir="runs/grpo", max_steps=80, per_device_train_batch_size=64, num_generations=16, max_completion_length=2,
    learning_rate=1e-2, temperature=1.0, use_cpu=True, bf16=False, save_strategy="no", logging_steps=10,
    report_to="none", disable_tqdm=True, seed=0,
)  # fmt: skip
trainer = GRPOTrainer(
    model, reward, args=arguments, train_dataset=Dataset.from_list(problems), processing_class=tokenizer
)
trainer.train()
rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
print("mean reward:", *(f"{value:.2f}" for value in rewards))
assert rewards[-1] > rewards[0]

# %% [markdown]
# ## What it writes
#
# `generate` is Hugging Face's own, with a cache that holds the memory too.

# %%
model.eval()
batch = tokenizer([problem["prompt"] for problem in problems], return_tensors="pt")
ids = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=1, do_sample=False)
said = tokenizer.batch_decode(ids[:, -1:])
right = sum(found == problem["larger"] for found, problem in zip(said, problems, strict=True))
print(f"{right} of {len(problems)} right; chance is about 1 in {len(WORDS)}")
