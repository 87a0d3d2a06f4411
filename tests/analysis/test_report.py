"""`report.html`: what it says is in the files, what is missing is left out, what comes from users is escaped."""

import html
import json
import math
import re
import shutil
import statistics

import pytest
import yaml

from commands import call
from undertow.analysis import compare, paired, report
from undertow.analysis.charts import CHARTS, curves

EVIL = '<script>alert("x")<b>&'
VALUES = {
    "name": "tiny",
    "backbone": {"family": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 2},
    "time": "T2MLR(0, 1)",
    "data": {"vocab_size": 64, "seq_len": 16},
    "training": {"max_steps": 3},
}  # fmt: skip
METRICS = [
    {"step": 1, "tokens": 8, "flops": 9.0, "loss": 4.5, "sweep_loss_0": 4.6, "sweep_loss_1": 4.4, "grad_norm": 1.5,
     "gates/memory_mixer/gate_m_mean": 0.5, "gates/memory_mixer/norm_m": 2.0, "tokens_per_second": 10.0},
    {"step": 2, "tokens": 16, "flops": 18.0, "loss": math.nan},
    {"step": 2, "tokens": 16, "flops": 18.0, "eval_bits_per_byte": 3.25, "eval_residual": 0.5,
     "eval_visit_change_0": 0.25, "eval_visit_gradient_0": 0.125},
]  # fmt: skip
RESULT = {
    "name": "tiny", "seed": 0, "parameters": 12345, "layer_evaluations": 2.0, "schedule": "Cyclic(G=8, n=3)",
    "steps": 3, "tokens": 48, "training_flops": 2.7e7, "bits_training": 3.25, "bits_true": 3.5,
    "evaluations": {"Cyclic(G=8, n=3)": {"bits_per_byte": 3.25, "passes": 4.0},
                    "Converge(G=16)": {"bits_per_byte": 3.5, "passes": 6.25}},
    "samples": [{"prompt": EVIL, "text": "</pre><img src=x onerror=alert(1)>"}],
    "environment": {"torch": "2.13"},
}  # fmt: skip
LENS = {
    "tokens": ["</script>", "b", "c"], "schedule": "Cyclic(G=8, n=3)",
    "visits": [{"name": "layer 0", "logp": [-2.0, -3.0, None], "best": ["b", EVIL, "c"]},
               {"name": "layer 1", "logp": [-1.0, -1.5, None], "best": ["b", "x", "c"]}],
    "passes": [{"name": "1 pass", "nats": 2.0, "distance": 0.5}, {"name": "all", "nats": 1.25, "distance": 0.01}],
    "memory": [0.5, -0.25, None], "distance": [0.0, 0.01, 0.02],
    "gates": {"memory_mixer gate m": [0.4, 0.5, 0.6], "memory_mixer change": [0.1, 0.2, 0.3]},
}  # fmt: skip


def run_folder(place, result=RESULT, lens=LENS, metrics=METRICS, **values):
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text(yaml.safe_dump(VALUES | values))
    if metrics:
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for name, held in (("result.json", result), ("lens.json", lens)):
        if held:
            (place / name).write_text(json.dumps(held))
    return place


def data_of(text):
    """The numbers that the page's script gets."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def headings(text):
    return [html.unescape(found) for found in re.findall(r"<h2>(.*?)</h2>", text)]


def test_a_run_says_what_its_files_say(tmp_path):
    text = report.page(run_folder(tmp_path / "run"))
    assert headings(text) == ["Plan and recipe", "Curves", "The latent gap", "A text, token by token", "Samples",
                              "Costs", "Again"]  # fmt: skip
    for said in ("3.2500", "3.5000", "12,345", "2.7e+07", "+0.2500 bits/byte", "6.25", 'class="undertow-plan"'):
        assert said in text
    assert "undertow train" in text and "recipe.yaml" in text and "2.13" in text
    data = data_of(text)
    series = {name: {one["name"]: one["points"] for one in chart["series"]} for name, chart in data["charts"].items()}
    assert series["loss"] == {"loss": [[1, 4.5], [2, None]], "sweep 0": [[1, 4.6]], "sweep 1": [[1, 4.4]]}
    assert series["gates"] == {"memory_mixer m": [[1, 0.5]]} and series["norms"] == {"memory_mixer": [[1, 2.0]]}
    assert series["residual"] == {"eval_residual": [[2, 0.5]]} and series["change"] == {"visit 0": [[2, 0.25]]}
    assert series["passes"] == {"memory": [[1, 0.5], [2, 0.01]]}
    shown = set(re.findall(r'data-chart="(\w+)"', text))
    assert shown == set(data["charts"])
    maps = {one["name"]: one["values"] for one in data["text"]["maps"]}
    assert maps["memory_mixer gate m"] == [0.4, 0.5, 0.6] and data["text"]["tokens"] == LENS["tokens"]
    assert maps["loss on this token"] == [None, 1.0, 1.5], "at the token that was predicted"
    assert maps["what the memory adds to this token's log-probability"] == [None, 0.5, -0.25]


def test_nothing_of_a_user_s_is_markup(tmp_path):
    text = report.page(run_folder(tmp_path / "run", name=EVIL, result=RESULT | {"name": EVIL}))
    outside = re.sub(r"<script>\n\"use strict\".*?</script>", "", text, flags=re.S)
    assert "alert(" in html.unescape(outside) and "<script>alert" not in outside and "<img" not in outside
    assert outside.count("</script>") == 1, "that of the data"
    assert f"<h1>{html.escape(EVIL).replace('&quot;', '&#34;')}</h1>" in text and 'class="undertow-plan"' in text


def test_what_is_missing_is_left_out(tmp_path):
    bare = run_folder(tmp_path / "bare", result=None, lens=None, metrics=None)
    text = report.page(bare)
    assert headings(text) == ["Plan and recipe", "Costs", "Again"] and "not finished" in text
    assert data_of(text) == {"charts": {}, "text": None}
    for folder, error in ((tmp_path / "nowhere", FileNotFoundError), (tmp_path, ValueError)):
        with pytest.raises(error):
            report.write(folder)
    (bare / "recipe.yaml").write_text("nonsense: 1\n")
    with pytest.warns(UserWarning, match="no plan"):
        assert headings(report.page(bare)) == ["Recipe", "Again"]


def test_written_again_at_will_and_without_a_network(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, out, err = call(capsys, "report", folder)
    assert status == 0 and "report.html" in out, err
    first = (folder / "report.html").read_bytes()
    report.write(folder)
    assert (folder / "report.html").read_bytes() == first
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.html"} == before
    text = first.decode()
    assert not re.search(r'(src|href)="(?!data:,")', text) and "url(" not in text.replace("url(#", "")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def comparison(place, seeds=(0, 1, 2), **models):
    """A folder as `undertow compare` leaves it; a model's values are its bits per byte, seed by seed."""
    place.mkdir()
    table = {}
    for number, (name, bits) in enumerate(models.items()):
        table[name] = []
        for seed, value in zip(seeds, bits, strict=True):
            label = f"{name}-seed{seed}"
            run_folder(place / label, result=None, lens=None, metrics=None, name=label)
            cost = {"training_flops": (number + 1) * 1e9}
            held = {**RESULT, "name": label, "seed": seed, "bits_true": value, **cost}
            table[name].append(held if value else {"name": label, "failed": "the loss is nan"})
    (place / "table.json").write_text(json.dumps(table))
    return place


def test_a_comparison(tmp_path):
    folder = comparison(tmp_path / "all", plain=(3.0, 3.2, 3.1), other=(2.9, 3.15, 3.2), broken=(None, None, None))
    report.write(folder / "other-seed0")
    text = report.page(folder)
    assert headings(text) == ["Results", "Paired differences", "Quality and cost", "Plans", "Samples", "Again"]
    assert "the loss is nan" in text and 'href="other-seed0/report.html"' in text and "diverged" in text
    off = [-0.1, -0.05, 0.1]
    half = 4.303 * statistics.stdev(off) / 3**0.5
    mean = statistics.mean(off)
    assert f"{mean:+.4f}" in text and f"{mean - half:+.4f} to {mean + half:+.4f}" in text and "2 of 3" in text
    chart = data_of(text)["charts"]["pareto_training"]
    points = {one["name"]: one["points"] for one in chart["series"]}
    assert points["plain"] == [[1e9, pytest.approx(3.1)]] and points["other"] == [[2e9, pytest.approx(9.25 / 3)]]
    assert points["frontier"] == [*points["plain"], *points["other"]]


def test_one_seed_has_no_interval_and_one_model_no_difference(tmp_path):
    text = report.page(comparison(tmp_path / "one", seeds=(0,), plain=(3.0,), other=(2.9,)))
    assert "95 %" not in text and "-0.1000" in text and "1 of 1" in text
    assert "Paired" not in report.page(comparison(tmp_path / "alone", seeds=(0,), plain=(3.0,)))


@pytest.mark.parametrize("df", range(1, 21))
def test_student_s_quantiles(df):
    """The density, integrated from the middle, leaves 2.5 % on each side."""
    gamma = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    end, n = paired.STUDENT[df - 1], 20000
    heights = [gamma * (1 + (end * i / n) ** 2 / df) ** (-(df + 1) / 2) for i in range(n + 1)]
    inside = (sum(heights) - (heights[0] + heights[-1]) / 2) * end / n
    assert 0.5 + inside == pytest.approx(0.975, abs=5e-5)


@pytest.mark.parametrize("better", [1, -1])
def test_the_frontier_holds_what_no_other_beats(better):
    points = [(3, 2), (1, 1), (2, 3), (2, 2), (4, 3), (5, 9), (1, 1), (6, -2)]

    def beaten(cost, quality):
        return any(
            c <= cost and better * q >= better * quality and (c, q) != (cost, quality) for c, q in points
        )  # fmt: skip

    assert paired.frontier(points, better) == sorted({point for point in points if not beaten(*point)})


def test_a_comparison_is_saved_as_it_is_read(tmp_path):
    shared = {key: VALUES[key] for key in ("backbone", "data")}
    models = [{"name": "a", "time": VALUES["time"]}, {"name": "b", "flops_of": "a", "training": {"batch_size": 3}}]
    plan = compare.parse(
        {**shared, "models": models, "seeds": [1, 2], "budget": {"tokens": 4e5, "match": "steps"}}, "p"
    )
    compare.save(plan, tmp_path / "comparison.yaml")
    again = compare.load([tmp_path / "comparison.yaml"])
    assert again == plan


def test_every_number_a_run_logs_about_itself_has_a_chart():
    """The keys of statistics and looks; a pattern that matches nothing is a mistake too."""
    keys = ["loss", "sweep_loss_0", "future_loss_1", "eval_bits_per_byte", "gates/a/gate_m_mean",
            "gates/a/gate_m_closed", "gates/a/gate_m_open", "gates/a/norm_m", "gates/a/scale_m",
            "eval_residual", "eval_memory_norm", "eval_visit_change_3", "eval_visit_gradient_12",
            "grad_norm", "learning_rate", "tokens_per_second"]  # fmt: skip
    made, first, folded = curves([{"step": 1, **dict.fromkeys(keys, 1.0)}])
    assert list(made) == [name for name, *_ in CHARTS] and sorted(made) == sorted([*first, *folded])
    assert sum(len(chart["series"]) for chart in made.values()) == len(keys)


def test_a_torn_or_copied_folder(tmp_path):
    """The page of a folder that was copied elsewhere names its new place in the command."""
    run_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "with space")
    assert f"undertow train &#39;{tmp_path}/with space/recipe.yaml&#39;" in report.page(tmp_path / "with space")
