"""Bad input gets one clear line that names the thing, its value and what is allowed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, LlamaConfig

import undertow as ut
from models import CONFIGS, LAYERS, build, ids
from undertow.methods import Method
from undertow.schedules import Schedule


def llama(**changes):
    return ut.from_scratch(CONFIGS["llama"](), **changes)


def bloom():
    return AutoModelForCausalLM.from_config(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20))


def eager():
    base = AutoModelForCausalLM.from_config(CONFIGS["undertow_llama"](), attn_implementation="eager")
    return ut.wrap(base, time=ut.T2MLR(1, 2))


def filled():
    """A cache of five tokens and their memory, of which nothing was recorded."""
    return build(time=ut.T2MLR(1, 2))(ids(1, 5)).past_key_values


CASES = [
    (lambda: ut.T2MLR(3, 1), ["start=3", "end=1"]),
    (lambda: llama(time=ut.T2MLR(3, -3)), ["start=3", "end=-3", "4 layers"]),
    (lambda: llama(time=ut.T2MLR(0, 9)), ["end=9", "0..3"]),
    (lambda: ut.T2MLR(0, 1, mixer="magic"), ["mixer='magic'", "gated"]),
    (lambda: ut.T2MLR(0, 1, carry="magic"), ["carry='magic'", "residual"]),
    (lambda: llama(time=ut.LRT(source=LAYERS)), ["source=4", "0..3"]),
    (lambda: ut.LRT(residual=False, key=False, value=False), ["at least one"]),
    (lambda: llama(depth=ut.ReuseMap([1, 2])), ["[1, 2]", "2 entries", "4 layers"]),
    (lambda: ut.ReuseMap([1, 0]), ["[1, 0]", "at least 1"]),
    (lambda: ut.BlockLoop(0), ["times=0", "at least 1"]),
    (lambda: llama(depth=ut.MiddleLoop(2, 1, 2)), ["start=2", "end=1"]),
    (lambda: ut.TRMBlock(insert=-2), ["insert=-2", "-1"]),
    (lambda: llama(depth=ut.TRMBlock(insert=4)), ["insert=4", "0..3", "-1"]),
    (lambda: llama(depth=ut.TRMBlock(heads=5)), ["heads=5", "32"]),
    (lambda: llama(depth=ut.T2MLR(1, 2)), ["depth=", "depth method"]),
    (lambda: llama(time="T2MLR"), ["time='T2MLR'", "time method"]),
    (lambda: Method.from_dict({"method": "T3"}, "time"), ["'T3'", "T2MLR", "LRT"]),
    (lambda: Method.from_dict({"method": "LRT", "sauce": 1}, "time"), ["'sauce'", "source"]),
    (lambda: Schedule.from_dict({"kind": "Cycle"}), ["'Cycle'", "Cyclic"]),
    (lambda: Schedule.from_dict({"kind": "Cyclic", "g": 1}), ["'g'", "'G'"]),
    (lambda: ut.Jacobi(-1), ["K=-1", "at least 0"]),
    (lambda: ut.Jacobi(2, loss="first"), ["'first'", "'last'"]),
    (lambda: ut.Jacobi(2, loss=(1, 1)), ["2 weights", "3"]),
    (lambda: ut.Jacobi(2, start="warm"), ["'warm'", "unmixed"]),
    (lambda: ut.Jacobi(2, loss="mean", adjoint=1), ["adjoint=1", "'mean'"]),
    (lambda: ut.Jacobi(0, adjoint=1), ["K=0", "adjoint=1", "at least 1"]),
    (lambda: ut.Cyclic(0, 1), ["G=0", "at least 1"]),
    (lambda: ut.Cyclic(2, 1, backward=1, adjoint=1), ["adjoint=1", "backward=1"]),
    (lambda: ut.Interleaved(0), ["S=0"]),
    (lambda: ut.Chunked(0), ["C=0"]),
    (lambda: ut.Converge(tol=-1.0), ["tol=-1.0"]),
    (lambda: ut.wrap(bloom()), ["'bloom'", "llama", "gpt2", "nanochat"]),
    (lambda: ut.from_scratch(BloomConfig()), ["'bloom'", "llama"]),
    (eager, ["'eager'", "sdpa"]),
    (lambda: build()(ids(2, 5), labels=ids(2, 4)), ["labels", "(2, 4)", "(2, 5)"]),
    (lambda: build()(ids(2, 5), memory_mask=torch.ones(2, 4)), ["memory_mask", "(2, 4)", "(2, 5)"]),
    (lambda: build()(ids(2, 5), attention_mask=torch.ones(2, 4)), ["attention_mask", "(2, 4)", "(2, 5)"]),
    (lambda: build()(ids(2, 5), position_ids=torch.ones(2, 4)), ["position_ids", "(2, 4)", "(2, 5)"]),
    (lambda: build()(), ["input_ids", "inputs_embeds"]),
    (lambda: build()(ids(2, 5), past_key_values=DynamicCache()), ["DynamicCache", "UndertowCache"]),
    (lambda: build("gpt2")(ids(1, 97)), ["97", "96"]),
    (lambda: build().generate(ids(), max_new_tokens=2, cache_implementation="static"), ["'static'", "'dynamic'"]),
    (lambda: filled().crop(1), ["crop(1)", "-5 to 0"]),
    (lambda: filled().crop(-6), ["crop(-6)", "-5 to 0"]),
    (lambda: filled().crop(-2), ["crop(-2)", "0 tokens are recorded", "activate_past_recording"]),
]


@pytest.mark.parametrize("make, says", CASES, ids=range(len(CASES)))
def test_one_line_that_names_it(make, says):
    with pytest.raises(ValueError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    for part in says:
        assert part in message, message


def test_config_is_json(tmp_path):
    model = ut.wrap(
        AutoModelForCausalLM.from_config(LlamaConfig(**CONFIGS["llama"]().to_diff_dict())),
        depth=ut.ReuseMap([1, 2, 1, 1]),
        time=ut.LRT(2),
    )
    model.config.save_pretrained(tmp_path)
    again = ut.UndertowConfig.from_pretrained(tmp_path)
    assert again.methods() == (ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)) and again.retrofit
