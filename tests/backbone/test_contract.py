"""What a family's adapter must give: the author of a new one is told here what is wrong."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import undertow as ut
from models import CONFIGS, build, gap, ids, randomise
from rounding import assert_same, same
from undertow.backbone import FAMILIES, Backbone, tapped


def plain(family):
    torch.manual_seed(0)
    return randomise(AutoModelForCausalLM.from_config(CONFIGS[family]()).double()).eval()


def test_every_family_is_tested():
    assert {t for family in FAMILIES for t in family.model_types} == set(CONFIGS)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_embed_layers_norm_head_is_the_model(family):
    """Attribute paths, learned positions, normed embeddings, soft caps: the plain program is the model."""
    lm, x = plain(family), ids()
    assert_same(ut.wrap(lm)(x, schedule=ut.Jacobi(0)).logits, lm(x).logits)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_taps_reach_exactly_keys_and_values(family):
    """Scaling what the taps see by 0 equals zero key or value weights; queries and the other one stay as they are."""
    for port in ("key", "value"):
        lm, x = plain(family), ids()
        backbone = Backbone(lm)
        before = lm(x).logits
        zero = {port: lambda y, a: 0 * y}
        ports = {}
        for layer in range(backbone.shape.layers):
            ports |= backbone.ports(layer, zero)
        with tapped(ports):
            tapped_logits = lm(x).logits
        assert_same(lm(x).logits, before)  # nothing lingers
        tap = getattr(backbone.family, port)
        for layer in backbone.layers:
            projection = layer.get_submodule(tap.module)
            rows = projection.weight.shape[0] if family != "gpt2" else projection.weight.shape[1]
            index = torch.arange(rows)
            if tap.parts == 3 and tap.by_head:
                index = index.view(backbone.shape.heads, 3, -1)[:, tap.index].flatten()
            elif tap.parts == 3:
                index = index.view(3, -1)[tap.index]
            weight = projection.weight if family != "gpt2" else projection.weight.T
            weight[index] = 0
            if projection.bias is not None:
                projection.bias[index] = 0
        assert gap(tapped_logits, lm(x).logits) < 1e-12
        assert gap(tapped_logits, before) > 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_taps_see_the_projections_own_input(family):
    lm = plain(family)
    backbone, seen = Backbone(lm), []
    ports = backbone.ports(1, {"key": lambda y, a: (seen.append((y.shape, a)), y)[1]})
    projection = backbone.layers[1].get_submodule(backbone.family.key.module)
    own = []
    projection.register_forward_pre_hook(lambda module, args: own.append(args[0]))
    with tapped(ports):
        lm(ids())
    (shape, a), *more = seen
    assert not more and same(a, own[0]) and shape[-1] == backbone.shape.kv_width


@pytest.mark.parametrize("family", CONFIGS)
def test_weight_names_are_hugging_faces_own(family):
    lm = plain(family)
    names = set(lm.state_dict())
    model = build(family, time=ut.LRT())
    model(ids())
    ours = {n.removeprefix("backbone.") for n in model.state_dict() if n.startswith("backbone.")}
    assert ours == names


def test_sliding_windows_bite():
    """The window is shorter than the text in the test configs: without it the logits differ."""
    for family in ("mistral", "qwen2"):
        wide = build(family, time=ut.T2MLR(1, 2), sliding_window=64)
        narrow = build(family, time=ut.T2MLR(1, 2))
        assert gap(narrow(ids()).logits, wide(ids()).logits) > 1e-4
