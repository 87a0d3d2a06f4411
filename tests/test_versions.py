"""What must run with every supported version of torch and transformers: `make test-newest`, `make test-oldest`.

Nothing here needs more than the package's own dependencies.
"""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Trainer, TrainingArguments

import undertow as ut
from undertow.versions import one_cache

ROOT = Path(__file__).parents[1]
SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=32, eos_token_id=None),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=64, eos_token_id=None, bos_token_id=None),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=32, eos_token_id=None, bos_token_id=None),
    "undertow_llama": ut.UndertowLlamaConfig(**SIZES, intermediate_size=32, eos_token_id=None),
    "undertow_nanochat": ut.UndertowNanoChatConfig(**SIZES),
}
METHODS = {
    "time": {"time": ut.T2MLR(1, 2)},
    "depth": {"depth": ut.ReuseMap([1, 2, 1])},
    "both": {"depth": ut.MiddleLoop(1, 1, times=2), "time": ut.LRT(source=-1)},
}


def batch():
    ids_BT = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_trains_generates_and_comes_back(family, method, tmp_path):
    model = ut.from_scratch(CONFIGS[family], **METHODS[method])
    row = batch()["input_ids"]
    data = [{"input_ids": x, "labels": x} for x in row]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    Trainer(model, args, train_dataset=data).train()
    assert any(not torch.equal(x, before[name]) for name, x in model.named_parameters())
    model.eval()
    greedy = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    made = model.generate(**batch(), **greedy)
    assert torch.equal(made, model.generate(**batch(), use_cache=False, **greedy))
    assert model.generate(**batch(), num_beams=2, **greedy).shape == made.shape
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_wrapped_model_is_the_plain_one(family):
    plain = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        logits = plain(**batch()).logits
        made = plain.generate(**batch(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        wrapped = ut.wrap(plain, time=ut.T2MLR(1, 2)).eval()
        torch.testing.assert_close(wrapped(**batch()).logits[1], logits[1])
    assert torch.equal(wrapped.generate(**batch(), max_new_tokens=4, do_sample=False, pad_token_id=0)[1], made[1])


def test_the_cache_has_both_names():
    model = ut.from_scratch(CONFIGS["llama"], time=ut.T2MLR(1, 2)).eval()
    ids = batch()["input_ids"][1:]
    whole = model(ids).logits[:, -1]
    for name in ("past_key_values", "cache"):
        first = model(ids[:, :-1], use_cache=True)
        assert first.past_key_values is first.cache is not None
        torch.testing.assert_close(model(ids[:, -1:], **{name: first.cache}).logits[:, -1], whole)
    assert model(ids, use_cache=False).past_key_values is None is model(ids, use_cache=False).cache
    with pytest.raises(ValueError, match="two names of one thing"):
        one_cache(first.cache, first.cache)


def test_the_oldest_versions_are_those_declared():
    """`pyproject.toml` says no lower bound that `make test-oldest` does not run."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]
    bounds = dict(re.findall(r'"([\w.-]+)>=([\d.]+)', declared))
    held = dict(
        re.findall(r"^([\w.-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8"), re.M)
    )

    def whole(version):
        return [int(part) for part in (version.split(".") + ["0", "0"])[:3]]

    assert set(bounds) == set(held)
    for name, bound in bounds.items():
        assert whole(bound) == whole(held[name]), name
