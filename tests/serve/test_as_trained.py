"""What was trained is what runs: a run whose prompts take in no memory is solved alike by every way of asking it.

The model has random weights in which the memory decides what is written. Its task asks for what the definition writes,
one forward a token without a cache, where the memory acts as in training; so a verb that reads a prompt in any other
way fails the task.
"""

import json
from dataclasses import replace

import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import undertow as ut
from commands import call
from models import randomise
from sums import CHARACTERS, Sums
from undertow.data.format import TextFormat
from undertow.evaluation.samples import sample
from undertow.recipe import Recipe
from undertow.schedules import Converge
from undertow.serve import api
from undertow.serve.chat import chat
from undertow.serve.decode import Sampling
from undertow.serve.engine import Limits
from undertow.tasks import TASKS
from undertow.training import kept, run

NEW, ASKED = 5, Sums(train=6, validation=2, test=3)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<bos>", "<end>", "<user>", "<assistant>"]


def characters(template: str | None) -> PreTrainedTokenizerFast:
    """One token a character, a bos, an end, and the markers of a chat."""
    tokens = {token: i for i, token in enumerate([*CHARACTERS, *"<>", "<unknown>", *SPECIAL])}
    made = Tokenizer(models.WordLevel(tokens, unk_token="<unknown>"))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<end>", chat_template=template,
        additional_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def mixing() -> ut.UndertowForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=48,
        max_position_embeddings=160, bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = randomise(ut.from_scratch(config, time=ut.T2MLR(0, 2)), 1).double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[-len(SPECIAL) - 1 :] = 0  # it writes characters, so that texts compare
    return model


@torch.no_grad()
def defined(model, tokenizer, given, memory, after=1) -> str:
    """What is written after these tokens: one forward a token, no cache."""
    ids, mask = list(given), list(memory)
    for _ in range(NEW):
        out = model(torch.tensor([ids]), memory_mask=torch.tensor([mask]), schedule=Converge(), use_cache=False)
        ids, mask = [*ids, int(out.logits[0, -1].argmax())], [*mask, after]
    return tokenizer.decode(ids[len(given) :])


def spelt(tokenizer, prompt: str, layout: str) -> list[int]:
    """A prompt's tokens, written out here once more."""
    marker = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    body = [tokenizer.convert_tokens_to_ids(letter) for letter in prompt]
    return [marker["<user>"], *body, marker["<assistant>"]] if layout == "chat" else [marker["<bos>"], *body]


@pytest.fixture(scope="module", params=["plain", "chat"])
def solved(request, tmp_path_factory):
    """`(folder, prompts, {policy: what the definition writes after each})`."""
    place = tmp_path_factory.mktemp(request.param) / "run"
    model, tokenizer = mixing(), characters(TEMPLATE if request.param == "chat" else None)
    prompts = [ASKED.example(record).prompt for record in ASKED.records("test")]
    wanted: dict[str, list[str]] = {"all": [], "response": [], "none": []}
    for prompt in prompts:
        ids = spelt(tokenizer, prompt, request.param)
        for policy, (before, after) in {"all": (1, 1), "response": (0, 1), "none": (0, 0)}.items():
            wanted[policy].append(defined(model, tokenizer, ids, [before] * len(ids), after))
    answers = list(zip(prompts, wanted["response"], strict=True))
    recipe = Recipe.parse({
        "name": "solved",
        "backbone": {"family": "llama", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
        "time": "T2MLR(0, 2)",
        "data": {"source": ASKED.to_dict() | {"answers": answers}, "seq_len": 64, "cache_dir": str(place / "cache")},
        "training": {"max_steps": 1},
        "evaluation": {"max_new_tokens": NEW, "new_tokens": NEW, "prompts": [prompts[0]]},
    })  # fmt: skip
    model.save_pretrained(place / "model")
    recipe.save(place / "recipe.yaml")
    data = kept.build(recipe.data.source, tokenizer=tokenizer, seq_len=64, cache_dir=place / "cache")
    kept.keep(place, data)
    data.format.save_pretrained(place / "model")
    assert sum(a == b for a, b in zip(wanted["response"], wanted["all"], strict=True)) <= 1, "memory must matter"
    return place, prompts, wanted


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(TASKS, "Sums", Sums)


TASKS.setdefault("Sums", Sums)  # module fixtures are made before `known`


def test_eval_solves_it_and_can_be_asked_otherwise(solved, capsys):
    folder, _, wanted = solved
    for policy, options in (("response", ()), ("all", ("--memory", "all")), ("none", ("--memory", "none"))):
        status, _, err = call(capsys, "eval", folder, "--device", "cpu", *options)
        assert status == 0, err
        found = json.loads((folder / "evaluation.json").read_text())
        right = [a == b for a, b in zip(wanted[policy], wanted["response"], strict=True)]
        assert found["accuracy"]["generated"]["accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("policy", ["run", "all", "response", "none"])
def test_generate(solved, capsys, policy):
    folder, prompts, wanted = solved
    expected = wanted["response" if policy == "run" else policy]
    options = ["--temperature", 0, "--max-new-tokens", NEW, "--device", "cpu", "--memory", policy]
    for prompt, text in list(zip(prompts, expected, strict=True))[:2]:
        status, out, err = call(capsys, "generate", folder, prompt, *options)
        assert (status, out) == (0, f"{prompt}{text}\n"), err


@pytest.fixture(params=["run", "all", "none"])
def client(solved, request):
    loaded = run.load(solved[0], "cpu", request.param)
    app = api.build(loaded.model, loaded.format, Limits(batch=4), "solved")
    yield TestClient(app), solved[2]["response" if request.param == "run" else request.param]
    app.state.engine.close()


def test_serve_in_batches_and_watched(solved, client):
    server, expected = client
    body = {"prompt": solved[1], "max_tokens": NEW, "temperature": 0}
    choices = server.post("/v1/completions", json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == expected
    body |= {"prompt": solved[1][1]}
    lines = server.post("/v1/look", json=body).text.split("\n\n")
    seen = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(event.get("text", "") for event in seen) == expected[1]


@pytest.mark.parametrize("solved", ["chat"], indirect=True)
def test_a_chat_is_laid_out_as_trained(solved, client):
    _, prompts, _ = solved
    server, expected = client
    for prompt, text in list(zip(prompts, expected, strict=True))[:2]:
        messages = [{"role": "user", "content": prompt}]
        body = {"messages": messages, "max_tokens": NEW, "temperature": 0}
        answer = server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert answer == text


@pytest.mark.parametrize("solved", ["chat"], indirect=True)
def test_a_conversation_takes_in_memory_where_the_assistant_has_spoken(solved):
    folder, prompts, wanted = solved
    loaded = run.load(folder, "cpu")
    given, said = iter([*prompts[:2], "/quit"]), []
    chat(loaded.model, loaded.format, Sampling(0), NEW, lambda: next(given), said.append)
    first, second = "".join(said).split("\n")[:2]
    assert first == wanted["response"][0]
    turns = [spelt(loaded.tokenizer, prompt, "chat") for prompt in prompts[:2]]
    answer = [*loaded.tokenizer.convert_tokens_to_ids(list(first)), loaded.tokenizer.eos_token_id]
    memory = [*[0] * len(turns[0]), *[1] * len(answer), *[0] * len(turns[1])]
    assert second == defined(loaded.model, loaded.tokenizer, [*turns[0], *answer, *turns[1]], memory)


def test_python(solved):
    """Of the folder alone: Hugging Face's classes, and the format."""
    folder, prompts, wanted = solved
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    form = ut.TextFormat.from_pretrained(folder)
    given = form.prompt(prompts)
    out = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert form.tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :]) == wanted["response"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert sample(model, tokenizer, prompts[0], NEW, temperature=0) == wanted["response"][0]
    if form.has_template:
        given = form.chat([{"role": "user", "content": prompts[1]}])
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert form.tokenizer.decode(out[0, given["input_ids"].shape[1] :]) == wanted["response"][1]
    off = replace(form, memory="none")
    with pytest.raises(ValueError, match="say new_tokens"):
        off.prompt(prompts)
    out = model.generate(**off.prompt(prompts[0], NEW), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert form.tokenizer.decode(out[0, -NEW:]) == wanted["none"][0]


def test_lm_eval(solved):
    """What is asked is prompt, what is scored or written is response."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from undertow.evaluation.harness_model import Recurrent

    folder, prompts, wanted = solved
    loaded = run.load(folder, "cpu")
    lm = Recurrent(loaded.model, loaded.format, chat=loaded.format.layout == "chat")

    def asked(prompt):
        return lm.apply_chat_template([{"role": "user", "content": prompt}]) if lm.chat else prompt

    def instances(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]

    options = {"until": [], "max_gen_toks": NEW, "do_sample": False}
    texts = lm.generate_until(instances("generate_until", [(asked(prompt), options) for prompt in prompts]))
    assert texts == wanted["response"]
    pairs = [(asked(prompt), text) for prompt, text in zip(prompts, wanted["response"], strict=True)]
    assert all(greedy for _, greedy in lm.loglikelihood(instances("loglikelihood", pairs)))


def test_the_verb_serve_hands_the_policy_on(solved, capsys, monkeypatch):
    seen = []

    def build(model, form, *more):
        seen.append(TextFormat.of(form).memory)
        raise ValueError("enough")

    monkeypatch.setattr(api, "build", build)
    for options in ((), ("--memory", "none"), ("--memory", "some")):
        status, _, err = call(capsys, "serve", solved[0], "--port", 0, "--device", "cpu", *options)
        assert status == 2
    assert seen == ["response", "none"] and "--memory some: allowed: run, all, response, none" in err
