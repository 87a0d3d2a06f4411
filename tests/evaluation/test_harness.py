"""lm-eval with the recurrence on: every number equals one computed directly, one request at a time."""

import io
import json
import math
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from letters import BOS, END, TOK, encode, go_on, log_p, recurrent, requests, tokenizer
from rich.console import Console

import undertow as ut
from models import build
from undertow.data.format import TextFormat
from undertow.evaluation import harness, likelihood
from undertow.evaluation.harness_model import Recurrent

ZERO = ut.Jacobi(0)  # reads no memory
QUESTIONS = [
    ("how many", ["ten", "two hens", "a"], 1),
    ("when the ab", ["then go", "to bed"], 0),
    ("who ran to the end", ["men", "a hen"], 1),
    ("why", ["to eat", "bab", "no.", "x"], 3),
    ("q", ["b", "c"], 0),
    ("q", ["d", "e"], 0),
]
PROMPTS = ["the hen", "a", "when we ran", "go on"]
STOPS = ["en", "x"]
TEXTS = ["the hen ran. ", "abba", "a long text that goes on and on"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return recurrent(time=ut.LRT(1))


# ---------------------------------------------------------------------- through lm-eval itself


def write(folder, name, records, **settings):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(lines)
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **settings}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def metric(name, how="mean"):
    return {"metric": name, "aggregation": how, "higher_is_better": True}


@pytest.fixture(scope="module")
def offline(tmp_path_factory, model):
    """Three tasks in a folder, scored by lm-eval under true decoding and with zero memory; and the written answers."""
    folder = tmp_path_factory.mktemp("tasks")
    write(
        folder, "tiny_choice",
        [{"question": q, "choices": c, "gold": g} for q, c, g in QUESTIONS],
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}", metric_list=[metric("acc"), metric("acc_norm")],
    )  # fmt: skip
    written = [go_on(model, prompt, 9, STOPS) for prompt in PROMPTS]
    write(
        folder, "tiny_writing",
        [{"prompt": p, "answer": written[i] if i % 2 else "never"} for i, p in enumerate(PROMPTS)],
        output_type="generate_until", doc_to_text="{{prompt}}", doc_to_target="{{answer}}",
        generation_kwargs={"until": STOPS, "max_gen_toks": 9}, metric_list=[metric("exact_match")],
    )  # fmt: skip
    write(
        folder, "tiny_text", [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[metric("bits_per_byte", "bits_per_byte"), metric("word_perplexity", "weighted_perplexity")],
    )  # fmt: skip
    group = {"group": "tiny_group", "task": ["tiny_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "tiny_group.yaml").write_text(json.dumps(group))
    names = ["tiny_group", "tiny_w*", str(folder / "tiny_text.yaml")]
    files, asked = [f"{folder}/tiny_choice.yaml", f"{folder}/tiny_text.yaml"], []
    score = Recurrent.loglikelihood
    with pytest.MonkeyPatch.context() as patch:  # seconds of shell commands that describe the machine
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
        scores = [
            harness.run(model, TOK, names, folder, batch_size=4, schedule=schedule, max_length=28, bootstrap=0)
            for schedule in (None, ZERO)
        ]
        patch.setattr(Recurrent, "loglikelihood", lambda lm, given: asked.extend(given) or score(lm, given))
        few = harness.run(model, TOK, files, limit=2, shots=1)
    return SimpleNamespace(recurring=scores[0], without=scores[1], few=few, written=written, asked=asked)


def accuracies(model, schedule):
    """(`acc`, `acc_norm`) of the questions."""
    plain = normed = 0
    for question, choices, gold in QUESTIONS:
        start = [BOS, *encode(question)]
        sums = []
        for choice in choices:
            whole = [BOS, *encode(f"{question} {choice}")]
            ids = [*start, *whole[len(start) :]]
            sums.append(sum(log_p(model, ids, len(ids) - len(start), schedule)))
        plain += sums.index(max(sums)) == gold
        per_letter = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        normed += per_letter.index(max(per_letter)) == gold
    return plain / len(QUESTIONS), normed / len(QUESTIONS)


def rolling(model, text, schedule=None, room=28):
    """The log-likelihood of a text: full windows, the last one with as much context as fits."""
    ids, total, done = [BOS, *encode(text)], 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + room)
        window = ids[max(0, end - room - 1) : end]
        total += sum(log_p(model, window, end - done, schedule))
        done = end
    return total


@pytest.mark.parametrize("which, schedule", [("recurring", ut.Sequential()), ("without", ZERO)])
def test_scores_of_lm_eval_are_those_computed_directly(offline, model, which, schedule):
    scores = getattr(offline, which)
    assert set(scores) == {"tiny_group", "tiny_choice", "tiny_writing", "tiny_text"}
    assert scores["tiny_group"]["acc"] == scores["tiny_choice"]["acc"]
    choice = scores["tiny_choice"]
    assert (choice["acc"], choice["acc_norm"]) == pytest.approx(accuracies(model, schedule))
    written = [go_on(model, prompt, 9, STOPS, schedule) for prompt in PROMPTS]
    right = [text == offline.written[i] and i % 2 == 1 for i, text in enumerate(written)]
    assert scores["tiny_writing"]["exact_match"] == pytest.approx(sum(right) / len(right))
    total = sum(rolling(model, text, schedule) for text in TEXTS)
    size, words = sum(len(text.encode()) for text in TEXTS), sum(len(text.split(" ")) for text in TEXTS)
    assert scores["tiny_text"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-6)
    assert scores["tiny_text"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert {score["samples"] for score in scores.values()} == {3, 4, 6}


def test_the_memory_matters(offline):
    """A run without memory, as the published one, is another number: the scores above are with the recurrence on."""
    assert offline.recurring["tiny_writing"]["exact_match"] == 0.5 > offline.without["tiny_writing"]["exact_match"]
    bits = [scores["tiny_text"]["bits_per_byte"] for scores in (offline.recurring, offline.without)]
    assert abs(bits[0] - bits[1]) > 1e-3 * bits[0]


def test_limit_shots_standard_errors_and_the_table(offline):
    assert {name: score["samples"] for name, score in offline.few.items()} == {"tiny_choice": 2, "tiny_text": 2}
    assert [request.args[0].count("\n\n") for request in offline.asked] == [1] * 5  # one example before each
    assert offline.few["tiny_choice"]["acc_stderr"] is not None
    assert offline.recurring["tiny_choice"]["acc_stderr"] is None
    assert json.loads(json.dumps(offline.few)) == offline.few
    with Console(file=io.StringIO(), width=120) as console:
        console.print(harness.table(offline.few | {"more": {"f,strict": 0.5, "f_stderr,strict": None}}))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    choice, text = offline.few["tiny_choice"], offline.few["tiny_text"]
    assert lines[0] == ["task", "metric", "items", "value", "standard", "error"]
    assert lines[1] == ["tiny_choice", "acc", "2", f"{choice['acc']:.4f}", f"{choice['acc_stderr']:.4f}"]
    assert ["tiny_text", "bits_per_byte", "2", f"{text['bits_per_byte']:.4f}", "-"] in lines
    assert lines[-1] == ["more", "f,strict", "0.5000", "-"]


@pytest.mark.parametrize(
    "tasks, arguments, line",
    [
        (["nowhere.yaml"], {}, "task nowhere.yaml: no such file"),
        ([], {}, "tasks: name at least one"),
        (["a"], {"include": "/nowhere"}, "/nowhere: no such folder of tasks"),
        (["a"], {"shots": -1}, "shots=-1: must be at least 0"),
        (["a"], {"limit": 0}, "limit=0: must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_one_line(tasks, arguments, line):
    with pytest.raises(ValueError, match=line):
        harness.run(None, TOK, tasks, **arguments)


def test_a_task_whose_data_is_not_here_is_one_line(tmp_path):
    write(tmp_path, "gone", [{"a": 1}], output_type="multiple_choice")
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(ValueError, match=r"task '.*gone.yaml': cannot be loaded: [^\n]+$"):
        harness.run(None, TOK, [str(tmp_path / "gone.yaml")])
    hub = {"task": "far", "dataset_path": "nobody/nothing", "output_type": "multiple_choice", "test_split": "test"}
    (tmp_path / "far.yaml").write_text(json.dumps(hub))
    with pytest.raises(ValueError, match=r"task 'far': cannot be loaded: [^\n]+$"):
        harness.run(None, TOK, ["far"], include=tmp_path)


@pytest.mark.slow  # lm-eval reads all its own task files
def test_an_unknown_task_is_one_line():
    with pytest.raises(ValueError, match=r"task 'hellaswagg': not a task of lm-eval; did you mean 'hellaswag'\? \d+"):
        harness.run(None, TOK, ["hellaswagg"])


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"^lm-eval is not installed: pip install 'undertow\[eval\]'$"):
        harness.run(None, TOK, ["a"])


# ---------------------------------------------------------------------- the model object

PAIRS = [(q, f" {choice}") for q, choices, _ in QUESTIONS[:3] for choice in choices]


@pytest.mark.parametrize("schedule", [None, ut.Interleaved(2), ut.Sequential()], ids=str)
def test_log_likelihoods_do_not_depend_on_the_batch(model, schedule):
    alone, together = (
        Recurrent(model, TOK, batch_size=size, schedule=schedule).loglikelihood(requests(*PAIRS)) for size in (1, 7)
    )
    for (context, continuation), one, other in zip(PAIRS, alone, together, strict=True):
        given, whole = [BOS, *encode(context)], [BOS, *encode(context + continuation)]
        ids = [*given, *whole[len(given) :]]
        direct = sum(log_p(model, ids, len(ids) - len(given), schedule))
        assert one[0] == pytest.approx(direct, rel=1e-7) and other[0] == pytest.approx(direct, rel=1e-7)
        assert one[1] == other[1]


def test_likeliest_continuations_are_said_to_be(model):
    lm = Recurrent(model, TOK)
    for prompt in PROMPTS[:2]:
        ids = [BOS, *encode(prompt)]
        best = [*ids]
        for _ in range(3):
            best.append(model(torch.tensor([best])).logits[0, -1].argmax().item())
        other = [*best[:-1], (best[-1] + 1) % 30]
        found = lm._loglikelihood_tokens([(None, ids, best[len(ids) :]), (None, ids, other[len(ids) :])])
        assert [greedy for _, greedy in found] == [True, False]


def test_letters_of_a_choice_are_one_run(model, monkeypatch):
    """Continuations of one token share their context's run, and score what they score alone."""
    runs = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **k: runs.append(len(ids)) or forward(self, ids, **k))
    found = Recurrent(model, TOK).loglikelihood(requests(("q", "a"), ("q", "b"), ("q", "c"), ("q x", "a")))
    assert runs == [2]
    for letter, (value, _) in zip("abc", found, strict=False):
        assert value == pytest.approx(sum(log_p(model, [BOS, *encode("q" + letter)], 1)), rel=1e-7)


def test_where_a_pair_is_cut():
    """lm-eval's own cut, and what it leaves to the model object."""
    lm, plain = (Recurrent(build(), tokenizer(bos=bos)) for bos in (True, False))
    t, h, e, n, a, b = (encode(letter)[0] for letter in "thenab")
    joined, space, en, ab = encode(" t")[0], encode(" ")[0], encode("en")[0], encode("ab")[0]
    assert len({joined, en, ab, space, t}) == 5
    assert lm._encode_pair("he", " the") == ([BOS, h, e], [joined, h, e])
    assert lm._encode_pair("he ", "the") == ([BOS, h, e], [joined, h, e])  # the space goes to the continuation
    assert lm._encode_pair("he", "n") == ([BOS, h, e], [n])  # joined with its context it would have no token
    assert plain._encode_pair("he", " a") == ([h, e], [space, a])
    assert plain._encode_pair("  ", "a") == ([plain.eot_token_id], [space, space, a])
    spelt = Recurrent(build(), TextFormat(TOK, special_tokens="ids"))
    assert spelt.tok_encode(f"{END}a") == [BOS, a] and lm.tok_encode(f"{END}a")[-1:] == [a] != [BOS]
    assert lm.tok_encode("a", add_special_tokens=False) == [a]
    assert Recurrent(build(), TOK, bos=False).tok_encode("a") == [a]


def test_empty_contexts_and_continuations(model):
    lm = Recurrent(model, TOK)
    (first, _), (nothing, greedy), (blank, _) = lm.loglikelihood(requests(("", "the hen"), ("a", ""), (" ", "hen")))
    assert first == pytest.approx(sum(log_p(model, [BOS, *encode("the hen")], len(encode("the hen")))), rel=1e-7)
    assert (nothing, greedy) == (0.0, True)
    assert blank == pytest.approx(sum(log_p(model, [BOS, *encode(" hen")], 3)), rel=1e-7)
    assert lm.loglikelihood_rolling(requests(("",))) == [0.0]


def test_long_contexts_lose_their_start_and_say_so(model):
    lm, long = Recurrent(model, TOK, max_length=8), "a long question to be read "
    with pytest.warns(UserWarning, match="log-likelihoods: 1 of 2 texts exceed 8 positions") as said:
        (cut, _), (whole, _) = lm.loglikelihood(requests((long, "xyz"), ("q", "xyz")))
    assert len(said) == 1
    assert cut == pytest.approx(sum(log_p(model, encode(long + "xyz")[-9:], 4)), rel=1e-7)
    assert whole == pytest.approx(sum(log_p(model, [BOS, *encode("qxyz")], 3)), rel=1e-7)
    with pytest.raises(ValueError, match=r"a text to score of 9 tokens: must be at most 8 \(positions\)"):
        lm.loglikelihood(requests(("q", "x" * 9)))
    stop = {"until": ["."], "max_gen_toks": 3}
    with pytest.warns(UserWarning, match="prompts to go on from: 1 of 1 texts exceed 8 positions"):
        lm.generate_until(requests((long, stop)))
    with pytest.raises(ValueError, match=r"max_gen_toks: 8: must be below 8 \(positions\)"):
        lm.generate_until(requests(("a", {**stop, "max_gen_toks": 8})))


def test_rolling_windows(model):
    """Each token once; windows of the model's positions, the last with full context."""
    text = TEXTS[2]
    assert len(encode(text)) == 29
    for room in (7, 14, 28, 96):
        found = Recurrent(model, TOK, batch_size=3, max_length=room).loglikelihood_rolling(requests((text,)))
        assert found == [pytest.approx(rolling(model, text, room=room), rel=1e-7)]


@pytest.mark.parametrize("schedule", [None, ut.Interleaved(2), ZERO], ids=str)
def test_generation_is_greedy_decoding_row_by_row(model, schedule):
    """In batches of unequal prompts; other schedules read everything anew for each token."""
    options = {"until": STOPS, "max_gen_toks": 9}
    direct = [go_on(model, prompt, 9, STOPS, schedule) for prompt in PROMPTS]
    assert len(set(direct)) > 2 and max(map(len, direct)) > 3
    for size in (1, 4):
        lm = Recurrent(model, TOK, batch_size=size, schedule=schedule)
        assert lm.generate_until(requests(*((prompt, options) for prompt in PROMPTS))) == direct


def test_requests_with_other_options_are_other_batches(model):
    lm = Recurrent(model, TOK)
    asked = [(p, {"until": [stop], "max_gen_toks": n}) for p, stop, n in zip(PROMPTS, "eexx", [3, 9] * 2, strict=True)]
    direct = [go_on(model, prompt, o["max_gen_toks"], o["until"]) for prompt, o in asked]
    assert lm.generate_until(requests(*asked)) == direct
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that Hugging Face would warn of
        sampled = lm.generate_until(requests(("a", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4})))
    assert len(TOK(sampled[0])["input_ids"]) <= 4


def test_stop_strings_end_a_row_at_once(model, monkeypatch):
    """Also where they lie across tokens; and a stop string that is a special token."""
    made = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **k: made.append(generate(self, **k)) or made[-1])
    free = go_on(model, "the hen", 12, [END])
    stop = free[2:5]
    assert len(encode(stop)) > 1
    lm = Recurrent(model, TOK)
    assert lm.generate_until(requests(("the hen", {"until": [stop], "max_gen_toks": 12}))) == [free[: free.index(stop)]]
    assert made[-1].shape[1] - len([BOS, *encode("the hen")]) < 12
    special = tokenizer()
    special.add_special_tokens({"additional_special_tokens": [free[3]]})
    asked = requests(("the hen", {"until": [free[3]], "max_gen_toks": 12}))
    assert Recurrent(model, special).generate_until(asked) == [free[: free.index(free[3])]]


def test_memory_of_the_response_alone():
    """T2MLR's second control flow: what is given takes in no memory."""
    model = recurrent(time=ut.T2MLR(0, 1))
    lm = Recurrent(model, TOK, memory="response")
    found = lm.loglikelihood(requests(*PAIRS[:4]))
    for (context, continuation), (value, _) in zip(PAIRS[:4], found, strict=True):
        given, whole = [BOS, *encode(context)], [BOS, *encode(context + continuation)]
        ids = torch.tensor([whole])
        mask = torch.tensor([[0] * len(given) + [1] * (len(whole) - len(given))])
        logits = model(ids, memory_mask=mask).logits[0].log_softmax(-1)
        direct = sum(logits[t - 1, whole[t]].item() for t in range(len(given), len(whole)))
        assert value == pytest.approx(direct, rel=1e-7)
        assert abs(value - sum(log_p(model, whole, len(whole) - len(given)))) > 1e-4
    options = {"until": ["e"], "max_gen_toks": 5}
    texts = lm.generate_until(requests(*((prompt, options) for prompt in PROMPTS)))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = [BOS, *encode(prompt)]
        given = len(ids)
        while len(ids) < given + 5 and "e" not in TOK.decode(ids[given:]):
            mask = torch.tensor([[0] * given + [1] * (len(ids) - given)])
            ids.append(model(torch.tensor([ids]), memory_mask=mask).logits[0, -1].argmax().item())
        assert TOK.decode(ids[given:], skip_special_tokens=True).split("e")[0] == text
    with pytest.raises(ValueError, match="memory='some': allowed: all, response"):
        Recurrent(model, TOK, memory="some")


def test_a_model_that_could_read_a_prefix_both_ways_is_given_none():
    """It scores a text as it reads one without a marked prefix: causally, so batches and tails change nothing."""
    model = build("llama", depth=ut.TRMBlock(inner=2, prefix=True))
    assert not model.program.causal
    lm = Recurrent(model, TOK, batch_size=5)
    for (context, continuation), (value, _) in zip(PAIRS, lm.loglikelihood(requests(*PAIRS)), strict=True):
        whole, total = [BOS, *encode(context + continuation)], 0.0
        for t in range(len(encode(context)) + 1, len(whole)):
            total += model(torch.tensor([whole[:t]])).logits[0, -1].log_softmax(-1)[whole[t]].item()
        assert value == pytest.approx(total, rel=1e-6)


def test_chat_template(model):
    chat = tokenizer()
    chat.chat_template = (
        "{% for turn in messages %}{{ turn.role }}.{{ turn.content }}|{% endfor %}"
        "{% if add_generation_prompt %}assistant.{% endif %}"
    )
    lm = Recurrent(model, chat)
    history = [{"role": "user", "content": "hen"}]
    assert lm.apply_chat_template(history) == "user.hen|assistant."
    history.append({"role": "assistant", "content": "ab"})
    assert lm.apply_chat_template(history, add_generation_prompt=False).endswith("assistant.ab")
    assert lm.chat_template(True) == chat.chat_template


def test_ends_needs_something_before_them(model):
    with pytest.raises(ValueError, match="text 1: the last 2 of 2 tokens: at least one must stand before them"):
        likelihood.ends(model, [([1, 2], 1), ([1, 2], 2)])
