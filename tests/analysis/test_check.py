"""`analysis.check`: a healthy model passes everything; every planted fault is caught, by the check that is for it."""

import types

import pytest
import torch

import undertow as ut
from models import CONFIGS, V, build, ids
from rounding import assert_same
from undertow import execute, inputs
from undertow.analysis import Report, label
from undertow.analysis.check import run
from undertow.analysis.gap import contraction
from undertow.cache import UndertowCache
from undertow.masks import Masks

STRUCTURE = ("causal", "cached", "padded", "packed", "batched")
SMALL = {False: {"num_hidden_layers": 2}, True: {"n_layer": 2}}
MODELS = {
    "reuse": lambda: build("llama", depth=ut.ReuseMap([2, 1, 1, 2])),
    "block": lambda: build("gpt2", depth=ut.TRMBlock(inner=1)),
    "memory": lambda: build("gpt2", time=ut.T2MLR(0, 1), n_layer=2),
}


def check(model, **arguments) -> Report:
    return run(model, batch=1, length=16, **arguments)


def broken(report: Report) -> list[str]:
    return [found.name for found in report.checks if found.ok is False]


@pytest.mark.parametrize(
    "family, methods",
    [
        ("llama", {}),
        ("gpt2", {"time": ut.T2MLR(0, 0)}),
        ("mistral", {"time": ut.T2MLR(0, -1, carry="residual")}),
        ("qwen3", {"time": ut.LRT(0)}),
        ("gpt_neox", {"depth": ut.TRMBlock(inner=1, layers=1), "time": ut.T2MLR(0, 1)}),
        ("nanochat", {"depth": ut.MiddleLoop(0, 0, 3, inject=True)}),
    ],
)
def test_healthy_models_pass_all(family, methods):
    report = check(build(family, **methods, **SMALL[family == "gpt2"]))
    assert report.ok, str(report)
    names = [found.name for found in report.checks]
    assert names[:5] == list(STRUCTURE)
    over_time = (
        ["gap", "position", "sweep", "contraction", "schedule", "gradient", "exact"]
        if "time" in methods
        else ["memory"]
    )
    assert names[5:] == over_time
    assert all(report[name].ok for name in STRUCTURE)


def test_nothing_about_the_model_changes():
    model = build("llama", time=ut.T2MLR(0, 1), num_hidden_layers=2).float()
    model.train()
    model.view.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    model(ids(1, 8), labels=ids(1, 8)).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    report = check(model)
    assert report.ok, str(report)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if name in gradients)


def test_same_seed_same_report():
    model = build("llama", depth=ut.ReuseMap([2, 1, 1, 2]))
    assert str(check(model)) == str(check(model))


# ---------------------------------------------------------------------- planted faults


def test_planted_bidirectional_layer(monkeypatch):
    """The attention of one layer sees all keys it is given, wherever no mask says otherwise."""
    model = build("llama")
    monkeypatch.setattr(model.view.layers[1].self_attn, "is_causal", False)
    report = check(model)
    assert "causal" in broken(report) and report["causal"].line.startswith("NO: under")


@pytest.mark.parametrize("opened", [True, False], ids=["trained", "gates closed"])
def test_planted_bidirectional_extra_block(monkeypatch, opened):
    """The extra block as published: no mask, not causal. Also when its gate is still closed."""
    if opened:
        model = MODELS["block"]()
    else:
        model = ut.wrap(build("gpt2").backbone, depth=ut.TRMBlock(inner=1)).double()
        assert_same(model(ids()).logits, model.backbone(ids()).logits)
    real = torch.nn.functional.scaled_dot_product_attention
    block = next(module for name, module in model.undertow.named_children() if hasattr(module, "qkv"))
    monkeypatch.setitem(
        type(block).forward.__globals__,
        "F",
        types.SimpleNamespace(
            scaled_dot_product_attention=lambda q, k, v, attn_mask=None, is_causal=False: real(q, k, v),
            silu=torch.nn.functional.silu,
        ),
    )
    assert "causal" in broken(check(model))


def test_planted_shared_cache_slot(monkeypatch):
    """Two visits of one layer keep their keys and values in one place while decoding."""
    model = MODELS["reuse"]()
    commit = UndertowCache.commit

    def shared(self, written, *arguments):
        first = self.slots[0]
        commit(self, written | {self.slots[1]: written[first]}, *arguments)

    assert model.program.steps[0].block == model.program.steps[1].block
    monkeypatch.setattr(UndertowCache, "commit", shared)
    report = check(model)
    assert "cached" in broken(report) and "packed" not in broken(report)


def _documents(monkeypatch, change):
    real = inputs._documents
    monkeypatch.setattr(inputs, "_documents", lambda *arguments: change(*real(*arguments)))


def test_planted_memory_that_ignores_padding(monkeypatch):
    model = MODELS["memory"]()
    _documents(monkeypatch, lambda documents, real, inside: (documents, None, inside))
    report = check(model)
    assert broken(report) == ["padded"] and "memory of pads" in report["padded"].line


def test_planted_memory_that_crosses_documents(monkeypatch):
    model = MODELS["memory"]()
    _documents(monkeypatch, lambda documents, real, inside: (documents, real, None))
    assert broken(check(model)) == ["packed"]


def test_planted_attention_that_crosses_documents(monkeypatch):
    model = build("gpt2")
    real = inputs._documents
    monkeypatch.setattr(
        inputs,
        "_documents",
        lambda mask, positions, *rest: (None, None, None) if positions is not None else real(mask, positions, *rest),
    )
    assert broken(check(model)) == ["packed"]


def test_planted_schedule_with_a_wrong_mask(monkeypatch):
    """Subset sweeps see one key too many."""
    model = MODELS["memory"]()
    make = Masks._staircase

    def one_more(self, positions, window, dtype=torch.bool):
        seen = make(self, positions, window, dtype).clone()
        for row, position in enumerate(positions):
            seen[..., row, position + 1 : position + 2] = dtype == torch.bool  # True, or a 0 to add
        return seen

    monkeypatch.setattr(Masks, "_staircase", one_more)
    report = check(model)
    leaks = report["causal"].values["leaks"]
    assert "causal" in broken(report)
    assert (
        leaks[label(ut.Cyclic(4, 1))] > 1e-3 and leaks[label(ut.Sequential())] == 0 and leaks[label(ut.Jacobi(2))] == 0
    )


def test_planted_memory_of_the_token_itself(monkeypatch):
    """A memory that is not shifted comes from the token's own future sweep, and from tokens after it."""
    model = MODELS["memory"]()
    real = execute.shifted

    def early(memory, seq, positions):
        m = real(memory, seq, positions)
        return torch.roll(m, -1, 1) if m.shape[1] > 1 else m

    monkeypatch.setattr(execute, "shifted", early)
    assert "causal" in broken(check(model))


def test_planted_memory_of_a_batch_mate(monkeypatch):
    model = MODELS["memory"]()
    real = execute.shifted
    monkeypatch.setattr(execute, "shifted", lambda *arguments: real(*arguments).roll(1, 0))
    report = check(model)
    assert "batched" in broken(report) and "causal" not in broken(report)


def test_planted_memory_left_behind_by_beams(monkeypatch):
    model = MODELS["memory"]()
    monkeypatch.setattr(UndertowCache, "_move", lambda self, change: None)
    report = check(model)
    assert broken(report) == ["batched"] and "reordered cache" in report["batched"].line


def test_planted_memory_not_kept_between_calls(monkeypatch):
    model = MODELS["memory"]()
    commit = UndertowCache.commit
    monkeypatch.setattr(
        UndertowCache, "commit", lambda self, written, memory, *rest: commit(self, written, None, *rest)
    )
    assert "cached" in broken(check(model))


def test_planted_weights_that_are_not_finite():
    model = MODELS["memory"]()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    report = check(model)
    assert not report.ok and "gap" in broken(report)


# ---------------------------------------------------------------------- what is measured


def test_gap_and_advice_know_the_schedules():
    """The exact schedule has no gap, the published one has; what is advised is as near as it says."""
    model, text = MODELS["memory"](), ids(2, 64)
    model.schedule = ut.Sequential()
    report = run(model, text)
    assert report["gap"].values["memory_largest"] < 1e-12
    assert report["gradient"].values["error"] < 1e-12 and report["gradient"].values["cosine"] > 1 - 1e-12
    assert report["exact"].values["passes"] <= 1 + 4  # ceil(64 / 16) rounds are always exact
    model.schedule = ut.Jacobi(1)
    worse = run(model, text)
    assert worse["gap"].values["memory_mean"] > 1e-2 and worse["gradient"].values["error"] > 1e-2
    true = model(text, schedule=ut.Sequential()).memory
    for goal, schedule in report["schedule"].values["reached"].items():
        memory = model(text, schedule=schedule).memory
        assert ((memory - true).norm(dim=-1) / true.norm(dim=-1)).mean() <= goal
        assert f"Cyclic({schedule.G}, {schedule.n})" in report["schedule"].line


def test_gap_by_position_and_by_sweep():
    """Written out: the parts and passes add up to the whole, the first tokens have no gap, and later passes less."""
    model, text = MODELS["memory"](), ids(2, 32)
    with torch.no_grad():
        model.undertow["memory_mixer"].scale_m.fill_(1.0)
    model.schedule = ut.Jacobi(3)
    report = run(model, text)
    whole, parts = report["gap"].values, report["position"].values["parts"]
    assert [(first, last) for first, last, *_ in parts] == [(0, 7), (8, 15), (16, 23), (24, 31)]
    more = torch.tensor([nats for *_, nats, _ in parts], dtype=torch.float64)
    tokens = torch.tensor([8.0, 8, 8, 7], dtype=torch.float64)  # nothing follows the last one
    assert abs(float((more * tokens).sum() / 31) - (whole["nats_true"] - whole["nats_training"])) < 1e-9
    assert sum(far for *_, far in parts) / 4 == pytest.approx(whole["memory_mean"], rel=1e-9)
    passes = report["sweep"].values["passes"]
    assert len(passes) == 4 and passes[-1][1:] == pytest.approx((whole["nats_training"], whole["memory_mean"]))
    assert passes[0][2] > passes[1][2] > passes[2][2] > passes[3][2]

    def gradients(schedule, part):
        labels = text.clone()
        labels[:, : 8 * part] = labels[:, 8 * part + 8 :] = -100
        loss = model(text, labels=labels, schedule=schedule).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    for part, cosine in enumerate(report["gradient"].values["parts"]):
        both = [gradients(schedule, part) for schedule in (model.schedule, ut.Sequential())]
        assert float(torch.cosine_similarity(*both, dim=0)) == pytest.approx(cosine, abs=1e-9)


def test_contraction_rate_follows_the_memorys_way_in():
    """The more of the memory comes in, the less a sweep contracts; with nothing of it, there is nothing to contract."""
    found = []
    for gain in (0.0, 0.5, 1.0, 6.0):
        model = MODELS["memory"]()
        with torch.no_grad():
            model.undertow["memory_projection"].weight.mul_(gain)
            model.undertow["memory_mixer"].scale_m.fill_(1.0 if gain else 0.0)
            found.append(contraction(model, {"input_ids": ids(2, 64)}))
    rates = [f.values["rate"] for f in found]
    assert rates[0] == 0 < rates[1] < rates[2] < rates[3]
    assert "changes nothing" in found[0].line and "adjoint gradient is safe" in found[1].line


def test_lines_for_people():
    report = check(MODELS["memory"]())
    text = str(report)
    assert text.count("\n") == len(report.checks) + 1
    for said in (
        "✓ causal       yes: no token moves an earlier logit (0.0e+00), under 7 schedules",
        "✓ cached       yes: decoding through the cache = one forward",
        "· gap          Cyclic(G=8, n=3, adjoint=4): ",
        "nothing is broken",
    ):
        assert said in text
    from rich.console import Console

    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "yes: no token moves an earlier logit" in console.export_text()
    without = check(build("gpt2"))
    assert "no memory: every schedule is one sweep" in without["memory"].line


def test_text_with_padding_and_documents():
    """A batch as the data gives it: position ids, labels and pads on the right."""
    x = ids(2, 32)
    position_ids = torch.cat([torch.arange(20), torch.arange(8), torch.zeros(4, dtype=torch.long)]).repeat(2, 1)
    mask = (torch.arange(32) < 28).long().repeat(2, 1)
    labels = torch.where((position_ids > 0) & mask.bool(), x, -100)
    batch = {"input_ids": x, "position_ids": position_ids, "attention_mask": mask, "labels": labels}
    report = run(MODELS["memory"](), batch)
    assert report.ok, str(report)


def test_frozen_model_and_bad_input():
    model = MODELS["memory"]()
    with pytest.raises(ValueError, match="at least 8 positions"):
        run(model, ids(2, 5))
    with torch.device("meta"):
        empty = ut.from_scratch(CONFIGS["gpt2"]())
    with pytest.raises(ValueError, match="meta device"):
        run(empty)
    model.requires_grad_(False)
    assert "frozen" in check(model)["gradient"].line
    assert V > 1


def test_recipe_and_saved_model(tmp_path):
    backbone = "family: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 64, vocab_size: 43"
    path = tmp_path / "r.yaml"
    path.write_text(f"backbone: {{{backbone}}}\ntime: T2MLR(0, 1)\ndata: {{seq_len: 32}}\n")
    report = run(path, overrides=["schedule=Jacobi(2)"], device="cpu", batch=2, length=32)
    assert report.ok and report.name == "r" and "Jacobi(K=2)" in report["gap"].line
    with pytest.raises(ValueError, match="models"):
        (tmp_path / "c.yaml").write_text("models: []\n")
        run(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "nothing.yaml")


def test_a_model_that_reads_a_prefix_both_ways_says_so():
    report = check(build("gpt2", depth=ut.TRMBlock(inner=1, prefix=True)))
    assert report["causal"].ok and "NOT within a prefix_mask" in report["causal"].line
    assert "prefix" not in check(build("gpt2", depth=ut.TRMBlock(inner=1)))["causal"].line.split(";")[-1].replace(
        "prefixes", ""
    )
