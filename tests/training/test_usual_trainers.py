"""Other people's trainers, unmodified: they see a causal language model and nothing of what is recurrent in it."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import undertow as ut
from models import CONFIGS, V, gap, ids, randomise
from undertow.data.corpus import Document
from undertow.data.tokenizer import train_tokenizer

QUIET = dict(report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False)
METHODS = {"t2mlr": ut.T2MLR(0, 1), "lrt": ut.LRT(1)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = "".join(f"{a}>{b}\n" for a in range(10) for b in range(10))
    return train_tokenizer([Document("0", text)], 257, tmp_path_factory.mktemp("cache"))


def tiny_config():
    return LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=257,
        max_position_embeddings=64, bos_token_id=256, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip


def tiny(time=None, schedule=None):
    torch.manual_seed(0)
    return ut.from_scratch(tiny_config(), time=time or ut.T2MLR(0, 1), schedule=schedule)


def plain_and_wrapped(config):
    """One model twice, the second time as a recurrent one that repeats nothing."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    return plain, ut.wrap(copy.deepcopy(plain), depth=ut.ReuseMap([1] * config.num_hidden_layers))


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


SETTINGS = {
    "label_smoothing": dict(label_smoothing_factor=0.1),
    "noise_on_embeddings": dict(neftune_noise_alpha=5),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "accumulation": dict(gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrapped_identity_trains_as_the_plain_model_does(setting, tmp_path):
    """What a tool knows a causal language model by (its class's name, its config) makes no difference to the losses."""
    losses, data = [], [{"input_ids": row, "labels": row} for row in ids(8, 12)]
    for model in plain_and_wrapped(tiny_config()):
        settings = dict(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, seed=1) | SETTINGS[setting]
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **settings, **QUIET), train_dataset=data)
        trainer.train()
        losses.append(logged(trainer))
        assert not model.config.use_cache  # Trainer's own setting
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("time", METHODS.values(), ids=list(METHODS))
def test_label_smoothing_is_on_the_next_token(time, tmp_path):
    """Its loss by hand: smoothed cross-entropy of shifted labels, not of a token with itself."""
    model, rows = tiny(time), ids(2, 8)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, label_smoothing_factor=0.2, **QUIET
    )
    with torch.no_grad():
        scores = model.train()(rows).logits[:, :-1].flatten(0, 1)
        wanted = torch.nn.functional.cross_entropy(scores, rows[:, 1:].flatten(), label_smoothing=0.2)
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    assert logged(trainer) == pytest.approx([float(wanted)], rel=1e-3)


@torch.no_grad()
def test_what_trl_reads_to_load_a_model_again(tmp_path):
    """By its folder, and where there is none by the name of the model in memory: the same model, weights and all."""
    utils = pytest.importorskip("trl.trainer.utils")
    model, x = randomise(tiny(schedule=ut.Cyclic(4, 1))).eval(), ids()
    model.save_pretrained(tmp_path)
    for place in (str(tmp_path), utils.get_config_model_id(model.config)):
        again = utils.create_model_from_path(
            place, dtype=model.dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        assert type(again) is type(model) and gap(again.eval()(x).logits, model(x).logits) < 1e-6, place
    assert again.schedule == model.schedule
    assert utils.compute_flops_per_token(model.config, 16) == utils.compute_flops_per_token(model.backbone.config, 16)


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


def preferences():
    return Dataset.from_list([{"prompt": f"{i}>", "chosen": f"{(i + 3) % 10}", "rejected": "77"} for i in range(8)])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "folder", "path"])
def test_trls_dpo_trainer_has_a_copy_as_its_reference(place, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    model, x = randomise(tiny()), ids()
    wanted = model.eval()(x).logits.detach()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    if place != "memory":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model") if place == "folder" else None
    args = trl.DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, **QUIET)
    trainer = trl.DPOTrainer(
        str(tmp_path / "model") if model is None else model,
        args=args,
        train_dataset=preferences(),
        processing_class=None if model is None else tokenizer,
    )
    trainer.train()
    assert type(trainer.ref_model) is ut.UndertowForCausalLM
    assert gap(trainer.ref_model.eval()(x).logits, wanted) < 1e-5  # as it was before training
    assert gap(trainer.model.eval()(x).logits, wanted) > 1e-3


@pytest.mark.slow
def test_trls_grpo_trainer_with_a_reference(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=4, beta=0.1,
        **QUIET,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=tiny(), reward_funcs=lambda completions, **columns: [float(len(text)) for text in completions], args=args,
        train_dataset=preferences().select_columns(["prompt"]), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert type(trainer.ref_model) is ut.UndertowForCausalLM


TRL = {
    "plain": {},
    "packed": dict(packing=True),
    "packed_and_cut": dict(packing=True, packing_strategy="wrapped"),
    "dft": dict(loss_type="dft"),
    "label_smoothing": dict(label_smoothing_factor=0.1),
    "checkpointing": dict(gradient_checkpointing=True),
    "noise_on_embeddings": dict(neftune_noise_alpha=5),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", TRL)
def test_trl_trains_a_wrapped_identity_as_the_plain_model(setting, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    data = Dataset.from_list([{"prompt": f"{i}>", "completion": f"{(i + 3) % 10}"} for i in range(8)])
    losses = []
    for model in plain_and_wrapped(tiny_config()):
        settings = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, max_length=32) | TRL[setting]
        args = trl.SFTConfig(str(tmp_path), **settings, **QUIET)
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses.append(logged(trainer))
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_trls_sft_trainer_by_path(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = Dataset.from_list([{"text": f"{i}>{i}"} for i in range(4)])
    trainer = trl.SFTTrainer(
        str(tmp_path / "model"), trl.SFTConfig(str(tmp_path), max_steps=1, **QUIET), train_dataset=data
    )
    trainer.train()
    assert type(trainer.model) is ut.UndertowForCausalLM and len(logged(trainer)) == 1


def test_lm_evals_window_and_vocabulary_are_the_backbones(tokenizer):
    models = pytest.importorskip("lm_eval.models.huggingface")
    for model in plain_and_wrapped(tiny_config()):
        read = models.HFLM(pretrained=model, tokenizer=tokenizer)
        assert (read.max_length, read.vocab_size, read.backend) == (64, tokenizer.vocab_size, "causal")


def test_sizes_that_tools_count():
    accelerate = pytest.importorskip("accelerate")
    plain, wrapped = plain_and_wrapped(CONFIGS["llama"]())
    for count in (
        lambda m: m.num_parameters(exclude_embeddings=True),
        lambda m: m.get_memory_footprint(),
        lambda m: accelerate.utils.calculate_maximum_sizes(m)[1][0],
        lambda m: (
            {name.removeprefix("backbone.") for name in accelerate.infer_auto_device_map(m, {"cpu": 10**9})}
            - {"undertow"}
        ),
        lambda m: (m.config.vocab_size, m.config.num_hidden_layers, m.loss_type, m._no_split_modules),
    ):
        assert count(wrapped) == count(plain)
    x = ids()
    losses = [m.loss_function(logits=m(x).logits, labels=x, vocab_size=m.config.vocab_size) for m in (plain, wrapped)]
    assert gap(*losses) < 1e-6 and wrapped.config.vocab_size == V
