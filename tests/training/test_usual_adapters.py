"""peft, unmodified: what it does to a plain model it does to the same model wrapped."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import undertow as ut
from models import CONFIGS, gap, ids

peft = pytest.importorskip("peft")
T2MLR = ut.T2MLR(1, 2)
TOKENS = [5, 6, 7]
GREEDY = dict(max_new_tokens=4, do_sample=False, pad_token_id=1)


def pair(family="llama", tied=True):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.tie_word_embeddings = tied
    plain = AutoModelForCausalLM.from_config(config).double()
    return plain, ut.wrap(copy.deepcopy(plain), time=T2MLR)


def trained(model, settings, steps=2):
    """The model with its adapter after a few steps on the adapter alone, and the losses."""
    torch.manual_seed(3)
    model = peft.get_peft_model(model, settings)
    chosen = [p for name, p in model.named_parameters() if p.requires_grad and "undertow" not in name]
    optimiser, losses, x = torch.optim.SGD(chosen, lr=0.5), [], ids()
    for _ in range(steps):
        loss = model(input_ids=x, attention_mask=torch.ones_like(x), labels=x).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return model.eval(), losses, sum(p.numel() for p in chosen)


def low_rank(**more):
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more)


SETTINGS = {
    "trained tokens": lambda: low_rank(trainable_token_indices=TOKENS),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=TOKENS),
    "embedding and head": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved embedding": lambda: low_rank(modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_adapters_and_their_merge(setting, tied):
    """A tied head learns what is learned of tokens; merging keeps it and the tie."""
    (plain, losses, count), (ours, our_losses, our_count) = (trained(m, SETTINGS[setting]()) for m in pair(tied=tied))
    assert our_count == count and our_losses == pytest.approx(losses, rel=1e-6) and losses[1] < losses[0]
    x = ids()
    with torch.no_grad():
        before = ours(x).logits
        assert gap(before, plain(x).logits) < 1e-5
        plain, ours = plain.merge_and_unload(), ours.merge_and_unload()
        assert gap(ours(x).logits, plain(x).logits) < 1e-5
    ties = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (plain, ours)]
    assert ties[0] == ties[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "encoder"])
def test_tuned_prompts(family, kind):
    """Losses, and text by greedy search and beams: virtual tokens count as positions."""
    config = {"prompt": peft.PromptTuningConfig, "encoder": peft.PromptEncoderConfig}[kind]
    config = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    (plain, losses, _), (ours, our_losses, _) = (trained(m, config) for m in pair(family))
    assert our_losses == pytest.approx(losses, rel=1e-6)
    x = ids()
    given = dict(input_ids=x, attention_mask=torch.ones_like(x), **GREEDY)
    for how in ({}, dict(num_beams=2)):
        assert torch.equal(ours.generate(**given, **how), plain.generate(**given, **how)), how


def test_a_tuned_prefix_is_one_clear_line():
    model = peft.get_peft_model(pair()[1], peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prompt tuning and adapters are"):
        model(input_ids=ids(), attention_mask=torch.ones_like(ids()))


def test_an_adapter_finds_its_model_again(tmp_path):
    base = pair()[1].float()
    base.save_pretrained(tmp_path / "base")
    model, _, _ = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), low_rank(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(ids()).logits
        for load in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
            assert gap(load.from_pretrained(tmp_path / "adapter").eval()(ids()).logits, wanted) < 1e-5
