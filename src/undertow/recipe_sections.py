"""The sections of a recipe: one class each, every key with its default, every mistake one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
# The largest sizes of a backbone: beyond them is a slip of the finger, and building it would never end.
SIZES = dict.fromkeys(("num_hidden_layers", "n_layer"), 10_000) | dict.fromkeys(
    (
        *("hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim", "vocab_size", "sliding_window"),
        *("num_attention_heads", "n_head", "num_key_value_heads", "max_position_embeddings", "n_positions"),
    ),
    1 << 24,
)
Fraction = Annotated[float, Field(ge=0, le=1)]
ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line."""


class Bad(RecipeError):
    """What is wrong with the value at `key`, relative to the section that is being checked."""

    def __init__(self, key: str, text: str):
        super().__init__(text)
        self.key = key


def choices(value, allowed: Sequence[str]) -> str:
    """The nearest match to `value`, if any, and all that is allowed."""
    folded = {name.lower(): name for name in reversed(allowed)}
    close = difflib.get_close_matches(str(value).lower(), list(folded), n=1, cutoff=0.5)
    return (f"did you mean {folded[close[0]]!r}? " if close else "") + f"allowed: {', '.join(allowed)}"


def one_line(error: BaseException) -> str:
    """The message of any exception on one line."""
    return " ".join(str(error).split())


def folder_name(value: str) -> str:
    """The value, if a folder directly below another one can have it as its name. Raises Bad."""
    plain = isinstance(value, str) and value.isprintable() and len(value.encode(errors="replace")) <= 200
    if not plain or not value or value != Path(value).name or value.startswith(".") or "\\" in value:
        raise Bad("", f"{value!r}: must be usable as the name of a folder")
    return value


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not converted, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Backbone(Section):
    """The model that is made recurrent: `family` and the fields of its Hugging Face config, or `pretrained`.

    `vocab_size` may be left out: it is then the tokenizer's. `attn_implementation` is a choice of this machine, not of
    the model: a saved one does not hold it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    family: str | None = None
    pretrained: str | None = None
    revision: str | None = None
    attn_implementation: str | None = None  # of ATTENTION, or a kernel's hub id; None: Hugging Face's default

    @field_validator("attn_implementation")
    @classmethod
    def _known_attention(cls, value):
        if value is not None and value not in ATTENTION and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", value):
            raise Bad("", f"{value!r} is not known; {choices(value, ATTENTION)}, or a kernel's hub id")
        return value

    @model_validator(mode="after")
    def _known_fields(self):
        if (self.family is None) == (self.pretrained is None):
            raise Bad("", "needs either family (a Hugging Face model type) or pretrained (a folder or a hub id)")
        extra = self.model_extra or {}
        for key in extra if self.pretrained is not None else ():
            allowed = "revision and attn_implementation"
            raise Bad(key, f"unknown key (value {extra[key]!r}); with pretrained only {allowed} are allowed")
        if self.family is not None and self.revision is not None:
            raise Bad("revision", f"{self.revision!r}: only with pretrained")
        if self.family is not None:
            self.hf_config()
        return self

    def hf_config(self, **defaults):
        """The Hugging Face config of `family`; `defaults` hold where the recipe says nothing.

        Raises:
            ValueError: unknown family, unknown field, or a value the config refuses.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import PreTrainedConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from undertow.backbone import FAMILIES

        supported = [name for family in FAMILIES for name in family.model_types]
        if self.family not in supported:
            raise Bad("family", f"{self.family!r} is not supported; {choices(self.family, supported)}")
        cls, values = CONFIG_MAPPING[self.family], dict(self.model_extra or {})
        general = {f.name for f in dataclasses.fields(PreTrainedConfig)}  # not about the architecture
        allowed = sorted({f.name for f in dataclasses.fields(cls)} - general | set(cls.attribute_map))
        for key in values:
            if key not in allowed:
                raise Bad(key, f"unknown key (value {values[key]!r}); {choices(key, allowed)}")
        for key in SIZES.keys() & {key for key, value in values.items() if value is not None}:
            if type(values[key]) is not int or not 1 <= values[key] <= SIZES[key]:
                raise Bad(key, f"{values[key]!r}: must be a whole number from 1 to {SIZES[key]:,}")
        try:
            return cls(**(defaults | values))
        except (StrictDataclassError, ValueError, TypeError, ArithmeticError, AttributeError, KeyError) as error:
            raise Bad("", one_line(error)) from error


class Pause(Section):
    """Pause tokens in the training rows: see `undertow.data.pause.Pauses`. Needs either `mean` or `replace`."""

    token: str  # as the tokenizer spells it
    mean: Annotated[float, Field(gt=0)] | None = None
    replace: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    only_recurrent: bool = True

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.mean is None) == (self.replace is None):
            raise Bad("", "needs either mean (copies inserted before a token) or replace (a probability)")
        return self


class Data(Section):
    """What is read: arguments of `undertow.data.build`. `source` holds the task itself where it names one."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    source: Any = "stdlib"
    tokenizer: str | None = None
    vocab_size: Positive = 4096
    seq_len: Annotated[int, Field(ge=2)] = 256
    validation: str | Annotated[tuple[str, ...], Field(strict=False)] | None = None
    validation_rows: Positive | None = None
    loss: Literal["response", "all"] | None = None
    memory: Literal["response", "all"] | None = None
    stream: bool = False
    documents: Positive = 2000  # of a chunk of a stream
    tokenizer_characters: Annotated[int, Field(gt=0, strict=False)] | None = None  # what the tokenizer is trained on
    cache_dir: str | None = None
    pause: Pause | None = None

    @field_validator("source")
    @classmethod
    def _task_or_paths(cls, value):
        from undertow.tasks.parse import open_source

        try:
            task = open_source(value)
        except Bad:
            raise
        except (ValueError, OSError) as error:
            raise Bad("", one_line(error)) from error
        if task is not None:
            return task
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise Bad("", f"{value!r}: should be a valid string, a list of them, or a task (a call or a mapping)")
        return value if isinstance(value, str) else tuple(value)

    @field_serializer("source")
    def _plain(self, value):
        from undertow.tasks.folder import Folder

        if isinstance(value, Folder):
            return value.path
        return value if isinstance(value, str | tuple) else value.to_dict()

    @model_validator(mode="after")
    def _use(self):
        from undertow.data import misuse
        from undertow.tasks import Task

        task = self.source if isinstance(self.source, Task) else None
        wrong = misuse(task, self.loss, self.memory, self.stream, self.validation)
        if wrong is not None:
            raise Bad(*wrong)
        return self


class RecurrentWeight(Section):
    """Weight of the carried state over training: from `start` to `end` while `warmup` (of all steps) lasts, then `end`.

    T2MLR's curriculum (arXiv 2607.15178). `exponential` is the square of `linear`, as published; `step` stays at
    `start` until the warm-up is over.
    """

    start: Annotated[float, Field(ge=0)] = 0.0
    end: Annotated[float, Field(ge=0)] = 1.0
    shape: Literal["linear", "cosine", "exponential", "step"] = "linear"
    warmup: Fraction = 1.0


class Lora(Section):
    """Low-rank adapters on the backbone (LoRA): see `undertow.training.adapters`. Merged into the saved model."""

    rank: Positive = 8
    alpha: Positive = 16  # the adapters' output is times alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | Annotated[tuple[str, ...], Field(strict=False)] = "all-linear"  # names of projections, as peft's


class Training(Section):
    """How it is trained. The first limit that is reached ends training.

    Limits: `max_steps`, `max_tokens`, `max_flops`, and `tokens_per_parameter`, which is so many tokens for every
    parameter of `undertow.training.budget.scaling_parameters`.
    """

    max_steps: Positive | None = None
    max_tokens: Annotated[float, Field(gt=0)] | None = None
    max_flops: Annotated[float, Field(gt=0)] | None = None
    tokens_per_parameter: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 16
    accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    recurrent_lr: Annotated[float, Field(gt=0)] = 1.0  # multiplies learning_rate for the parameters under `undertow.`
    lr_groups: dict[str, Annotated[float, Field(ge=0)]] = {}  # regex of a name: its multiplier; the last match wins
    optimiser: Literal["adamw", "muon", "nanochat"] = "adamw"  # see `undertow.training.optimisers`
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    decay: Literal["cosine", "linear", "stable", "constant"] = "cosine"
    warmup: Fraction = 0.05  # of all steps
    cooldown: Fraction = 0.5  # of all steps: how long a stable learning rate falls, linearly, at the end
    floor: Fraction = 0.0  # where cosine, linear and stable end, of the learning rate
    recurrent_weight: RecurrentWeight | None = None
    train_only: str | None = None  # regex: parameters whose names do not match are frozen
    lora: Lora | None = None  # instead of the backbone's own weights
    gates_first: Fraction = 0.0  # of all steps: only what is under `undertow.` is trained, then the rest, too
    clip: Annotated[float, Field(ge=0)] = 1.0
    nonfinite: Literal["stop", "skip"] = "stop"  # at a step whose loss or gradient is not finite
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False
    skip_logits: bool = False  # in training: a chunked loss that never holds all logits (large vocabularies)
    compile: bool = False  # each layer, by torch.compile
    log_every: Positive = 10
    save_every: Positive = 200
    keep: Positive = 2
    workers: Annotated[int, Field(ge=0)] = 0
    tensorboard: bool = True
    report_to: list[Literal["trackio", "wandb"]] = []  # experiment trackers, beside TensorBoard's files
    statistics: bool = True  # of gates and norms, at logging steps

    @field_validator("lr_groups", "train_only")
    @classmethod
    def _regexes(cls, value):
        for pattern in value if isinstance(value, dict) else [value] if value else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise Bad("", f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _phases(self):
        if self.decay == "stable" and self.warmup + self.cooldown > 1:
            raise Bad("cooldown", f"{self.cooldown}: with warmup {self.warmup} it exceeds all steps")
        if self.lora is not None and self.train_only is not None:
            raise Bad("lora", f"says what is trained, and so does train_only ({self.train_only!r}); leave one out")
        return self


class Future(Section):
    """Heads that predict tokens further ahead: the arguments of `undertow.future.FutureHeads`."""

    heads: Positive = 4
    layers: Positive = 2
    source: int = -1
    weights: Annotated[list[Annotated[float, Field(ge=0)]], Field(strict=False)] | None = None
    trunk: Annotated[float, Field(ge=0)] = 0.0


class Evaluation(Section):
    """How it is measured. `points` evaluations of `rows` validation rows while training, all rows at the end.

    Where the data is a task with answers or tags, its accuracy on `records` records of `split`, too: exactly, and by
    generation (greedy; with several `samples` pass@k for each k of `pass_at`, or for k = `samples`). Where `text`
    names other text, also bits per byte of it under true decoding (`bits_text`): what fine-tuning forgot.
    """

    batch_size: Positive = 16
    points: Annotated[int, Field(ge=0)] = 8
    rows: Positive | None = 64
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    sequential: bool = False  # also decode position by position: slow, the definition itself
    text: str | None = None  # a file, a folder, a glob, `topics` or `stdlib`
    text_rows: Positive = 32  # rows of `data.seq_len` tokens of it, a fixed sample
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    new_tokens: Positive = 48
    accuracy: bool | None = None  # None: where the data is such a task
    split: Literal["train", "validation", "test"] = "test"
    records: Positive = 200  # at most; of text, so many documents (`--lengths`, `--icl`)
    samples: Positive = 1
    temperature: Annotated[float, Field(ge=1e-6)] = 0.8  # of several samples
    pass_at: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    max_new_tokens: Positive | None = None  # of an answer; None: as many as the longest gold one

    @model_validator(mode="after")
    def _enough_samples(self):
        for k in self.pass_at:
            if k > self.samples:
                raise Bad("pass_at", f"{k}: exceeds samples, {self.samples}")
        return self
