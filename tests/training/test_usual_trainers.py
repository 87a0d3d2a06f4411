"""Other people's trainers, unmodified: they see a causal language model and nothing of what is recurrent in it."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, Trainer, TrainingArguments

import undertow as ut
from models import gap, ids, randomise
from undertow.data.corpus import Document
from undertow.data.tokenizer import train_tokenizer

QUIET = dict(report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False)
METHODS = {"t2mlr": ut.T2MLR(0, 1), "lrt": ut.LRT(1)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = "".join(f"{a}>{b}\n" for a in range(10) for b in range(10))
    return train_tokenizer([Document("0", text)], 257, tmp_path_factory.mktemp("cache"))


def tiny(time=None, schedule=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=257,
        max_position_embeddings=64, bos_token_id=256, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    return ut.from_scratch(config, time=time or ut.T2MLR(0, 1), schedule=schedule)


def logged(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def moved(model, before):
    """Whether what is new was trained, too."""
    after = model.state_dict()
    return any(not torch.equal(x, after[name]) for name, x in before.items() if name.startswith("undertow."))


@pytest.mark.parametrize("time", METHODS.values(), ids=list(METHODS))
def test_hugging_faces_trainer(time, tmp_path):
    """Its first logged loss is ours; it divides accumulated micro-batches by all labels of the step."""
    model, rows = tiny(time), ids(4, 12)
    before = copy.deepcopy(model.state_dict())
    first = model.train()(rows, labels=rows).loss.item()
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, gradient_checkpointing=True, **QUIET,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(first, abs=1e-3) and losses[-1] < losses[0] - 0.5
    assert moved(model, before) and model.is_gradient_checkpointing


@torch.no_grad()
@pytest.mark.parametrize("time", METHODS.values(), ids=list(METHODS))
def test_the_base_model_is_the_recurrence_without_its_head(time):
    model, x = randomise(tiny(time)).eval(), ids()
    states = model.base_model(input_ids=x, use_cache=False).last_hidden_state
    assert gap(model.get_output_embeddings()(states), model(x).logits) < 1e-6
    assert gap(states, model.backbone.model(x).last_hidden_state) > 1e-2  # the bare backbone has no memory


def test_trls_sft_trainer(tokenizer, tmp_path):
    """It takes the loss from `base_model` and the LM head itself; under a last-sweep schedule that is our loss."""
    trl = pytest.importorskip("trl")
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    data = Dataset.from_list([{"prompt": f"{i}>", "completion": f"{(i + 3) % 10}"} for i in range(8)])
    args = trl.SFTConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, max_length=32, **QUIET
    )
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        first = float(model.train()(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss)
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(first, abs=1e-3) and losses[-1] < losses[0] - 0.5
    assert moved(model, before)


@pytest.mark.slow
def test_trls_grpo_trainer(tokenizer, tmp_path):
    """Log-probabilities of what was drawn are the recurrence's; every completion is rewarded and weights move."""
    trl = pytest.importorskip("trl")
    model, rewards = tiny(), []
    before = copy.deepcopy(model.state_dict())

    def reward(completions, **columns):
        rewards.append([float(any(c.isdigit() for c in text)) for text in completions])
        return rewards[-1]

    args = trl.GRPOConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=8, max_completion_length=4,
        learning_rate=1e-2, **QUIET,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{i}>"} for i in range(8)]),
        processing_class=tokenizer,
    )
    x = ids(2, 9) % 257
    with torch.no_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(model.eval(), x, torch.ones_like(x), 4)
        scores = (model(x).logits[:, 4:-1] / trainer.temperature).log_softmax(-1)
    assert gap(found, scores.gather(-1, x[:, 5:, None])[..., 0]) < 1e-5
    trainer.train()
    assert len(rewards) == 3 and moved(model, before)
