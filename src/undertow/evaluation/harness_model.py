"""A model as lm-eval's `LM`: scored and generating under a schedule. The only module that needs lm-eval to load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows
from transformers import StoppingCriteria

from undertow.data.format import Memory, TextFormat, checked, pad_id
from undertow.evaluation import likelihood
from undertow.schedules import Converge, Schedule, Sequential
from undertow.training.precision import autocast


class Recurrent(TemplateLM):
    """An `UndertowForCausalLM` for `lm_eval.simple_evaluate`; arguments as those of `evaluation.harness.score`.

    `chat`: the texts come from `apply_chat_template`.

    How a pair of context and continuation is cut into tokens, and a long text into windows, is lm-eval's own code.
    """

    def __init__(
        self,
        model,
        form,
        batch_size: int = 16,
        schedule: Schedule | None = None,
        precision: str = "float32",
        memory: Memory | None = None,
        bos: bool | None = None,
        max_length: int | None = None,
        show: bool = False,
        chat: bool = False,
    ):
        super().__init__()
        read = checked(TextFormat.of(form, trained=True))
        self.form = replace(read, memory=memory or read.memory, bos=read.bos if bos is None else bos)
        self.model, self.batch_size, self.show = model, batch_size, show
        self.tokenizer: Any = self.form.tokenizer
        self.schedule, self.precision, self.chat = schedule or Converge(), precision, chat
        self.max_length = max_length or likelihood.positions(model)
        self.max_gen_toks = min(256, self.max_length // 2)  # where a task does not say

    # ------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Under which lm-eval caches what it tokenised."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The tokens, begun as in training (unless `add_special_tokens` is False).

        A chat is begun as its template says, and its markers are tokens, whoever wrote them.
        """
        if self.chat:
            options = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
            return self.tokenizer(string, **options)["input_ids"]
        ids = self.form.encode([string])[0]
        return ids if add_special_tokens is False else self.form.begun(ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's own cut; where it leaves one side without a token, that side is given its own."""
        given, new = super()._encode_pair(context, continuation)
        return given or [self.prefix_token_id], new or self.tok_encode(continuation, add_special_tokens=False)

    # ------------------------------------------------------------------ scores

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """`(log-probability in nats, whether greedy decoding gives it)` of each request's continuation."""
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        texts = [([*given, *new], len(new)) for _, given, new in requests]
        texts = likelihood.fit(texts, self.max_length, "log-likelihoods")
        return [(log_p.sum().item(), bool(best.all())) for log_p, best in self._ends(texts, "log-likelihoods")]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Every token of a text once, each after as many tokens as its window holds, the first after bos (or eos)."""
        texts, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for inputs, new in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                texts.append(([*inputs, new[-1]], len(new)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, self._ends(texts, "perplexities"), strict=True):
            totals[i] += log_p.sum().item()
        return totals

    def _ends(self, texts: Sequence, title: str):
        show = title if self.show else None
        return likelihood.ends(
            self.model, texts, self.schedule, self.batch_size, self.precision, self.form.memory, show=show
        )

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        """Texts up to the first of each request's stop strings, or eos; prompts are padded on the left.

        Raises:
            ValueError: no position is left for a prompt.
        """
        asked = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        prompts, cut = [], 0
        for request, options in zip(requests, asked, strict=True):
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks: {options['max_gen_toks']}: must be below {self.max_length} (positions)"
                )
            ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            cut += len(ids) > room
            prompts.append(ids[-room:])
        likelihood.say_cut(cut, len(requests), self.max_length, "prompts to go on from")
        alike: dict[tuple, list[int]] = defaultdict(list)  # requests that can be one batch
        for i in sorted(range(len(requests)), key=lambda i: -len(prompts[i])):
            # Other schedules count their subsets of positions from the left, pads included: there only equal lengths.
            alike[repr(sorted(asked[i].items())), 0 if self._cached else len(prompts[i])].append(i)
        size, texts = self.batch_size, [""] * len(requests)
        batches = [group[at : at + size] for group in alike.values() for at in range(0, len(group), size)]
        for number in likelihood.steps(range(len(batches)), "generated texts" if self.show else None):
            batch = batches[number]
            for i, text in zip(batch, self._generate([prompts[i] for i in batch], asked[batch[0]]), strict=True):
                texts[i] = text
        return texts

    @property
    def _cached(self) -> bool:
        """Whether decoding from a cache is what the schedule computes. If not, every new token reads all anew."""
        whole = isinstance(self.schedule, Converge) and self.schedule.max_sweeps is None
        return whole or isinstance(self.schedule, Sequential)

    def _generate(self, prompts: list[list[int]], asked: dict) -> list[str]:
        options, end, added = dict(asked), self.eot_token_id, self.tokenizer.get_added_vocab()
        until, new_tokens = [string for string in options.pop("until") if string], options.pop("max_gen_toks")
        last = sorted({end, *(added[string] for string in until if string in added)})
        if not options["do_sample"]:
            options.pop("temperature", None)  # lm-eval says 0, Hugging Face `do_sample=False`
        given = self.form.batch([self.form.given(ids) for ids in prompts], new_tokens)
        T = given["input_ids"].shape[1]
        with autocast(self.precision, self.model.device):
            out_BT = self.model.generate(
                **{name: x.to(self.model.device) for name, x in given.items()},
                max_new_tokens=new_tokens,
                stopping_criteria=[Stop(self.tokenizer, until, T)],
                eos_token_id=last,
                pad_token_id=pad_id(self.tokenizer),
                schedule=self.schedule,
                use_cache=self._cached,
                **options,
            )
        return [self._text(new, until, last) for new in out_BT[:, T:].tolist()]

    def _text(self, new: list[int], until: list[str], last: list[int]) -> str:
        ended = next((t for t, token in enumerate(new) if token in last), len(new))  # what follows is padding
        text = self.tokenizer.decode(new[:ended], skip_special_tokens=True)
        for string in until:
            text = text.split(string)[0]
        return text


class Stop(StoppingCriteria):
    """A row is done when its new text holds a stop string, however the tokens cut it."""

    def __init__(self, tokenizer, strings: list[str], prompt: int):
        self.tokenizer, self.strings, self.prompt = tokenizer, strings, prompt

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        done = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)
