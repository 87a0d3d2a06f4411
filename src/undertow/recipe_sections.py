"""The sections of a recipe: one class each, every key with its default, every mistake one line."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_serializer, field_validator, model_validator

from undertow.recipe_base import Bad, Conditional, DoesNotApply, Section, choices, one_line

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
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from undertow.backbone import FAMILIES, config_fields

        supported = [name for family in FAMILIES for name in family.model_types]
        if self.family not in supported:
            raise Bad("family", f"{self.family!r} is not supported; {choices(self.family, supported)}")
        cls, values = CONFIG_MAPPING[self.family], dict(self.model_extra or {})
        allowed = config_fields.allowed(cls)
        for key in values:
            if key not in allowed:
                raise Bad(key, f"unknown key (value {values[key]!r}); {choices(key, allowed)}")
        for key in SIZES.keys() & {key for key, value in values.items() if value is not None}:
            if type(values[key]) is not int or not 1 <= values[key] <= SIZES[key]:
                raise Bad(key, f"{values[key]!r}: must be a whole number from 1 to {SIZES[key]:,}")
        twice = config_fields.twice(cls, values)
        if twice is not None:
            raise Bad(
                twice[0], f"{values[twice[0]]!r}: is the same field as {twice[1]} ({values[twice[1]]!r}); keep one"
            )
        try:
            ignored = config_fields.ignored(cls, values)
            if ignored is not None:
                raise DoesNotApply(ignored, values[ignored], f"this {self.family}, where nothing reads it")
            return cls(**(defaults | values))
        except Bad:
            raise
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
    vocab_size: Positive | None = None  # of the tokenizer that is trained; None: 4096
    seq_len: Annotated[int, Field(ge=2)] = 256
    validation: str | Annotated[tuple[str, ...], Field(strict=False)] | None = None
    validation_rows: Positive | None = None
    loss: Literal["response", "all"] | None = None
    memory: Literal["response", "all"] | None = None
    bos: bool | None = None  # whether texts begin with the tokenizer's bos; None: where it has one (tags: never)
    eos: bool = True  # whether documents end with its eos
    special_tokens: Literal["text", "ids"] = "text"  # what a special token is that a text spells out
    layout: Literal["plain", "chat"] | None = None  # of a task's prompts; None: a chat where there is a template
    stream: bool = False
    documents: Positive | None = None  # of a chunk of a stream; None: 2000
    tokenizer_characters: Annotated[int, Field(gt=0, strict=False)] | None = None  # what the tokenizer is trained on
    cache_dir: str | None = None
    pause: Pause | None = None

    conditional: ClassVar = (
        Conditional("vocab_size", 4096, lambda s: not s.has_tokenizer, "data that has its tokenizer"),
        Conditional("tokenizer_characters", None, lambda s: not s.has_tokenizer, "data that has its tokenizer"),
        Conditional("documents", 2000, lambda s: s.stream, "data that is read at once (stream: false)"),
    )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer is given, here or by the task, so that none is trained."""
        from undertow.tasks import Task

        return self.tokenizer is not None or (isinstance(self.source, Task) and self.source.tokenizer() is not None)

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
        from undertow.data.paths import exists
        from undertow.tasks import Task

        task = self.source if isinstance(self.source, Task) else None
        if task is None and isinstance(self.source, str) and not exists(self.source):
            return self  # what it was is not known; whoever reads it says that it is gone
        format = {name: getattr(self, name) for name in ("loss", "memory", "bos", "eos", "special_tokens", "layout")}
        wrong = misuse(task, stream=self.stream, validation=self.validation, **format)
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
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None  # of AdamW; None: 0.9 and 0.95
    decay: Literal["cosine", "linear", "stable", "constant"] = "cosine"
    warmup: Fraction = 0.05  # of all steps
    cooldown: Fraction | None = None  # of all steps: how long a stable rate falls, linearly, at the end; None: 0.5
    floor: Fraction | None = None  # where cosine, linear and stable end, of the learning rate; None: 0
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

    conditional: ClassVar = (
        Conditional(
            *("betas", (0.9, 0.95), lambda s: s.optimiser != "nanochat"),
            otherwise="optimiser 'nanochat', which has published ones for each group",
        ),
        Conditional("cooldown", 0.5, lambda s: s.decay == "stable", "a decay other than 'stable'"),
        Conditional("floor", 0.0, lambda s: s.decay != "constant", "decay 'constant', which never falls"),
    )

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
        if self.decay == "stable" and self.warmup + self.value("cooldown") > 1:
            raise Bad("cooldown", f"{self.value('cooldown')}: with warmup {self.warmup} it exceeds all steps")
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
    text_rows: Positive | None = None  # rows of `data.seq_len` tokens of it, a fixed sample; None: 32
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    new_tokens: Positive = 48
    accuracy: bool | None = None  # None: where the data is such a task
    split: Literal["train", "validation", "test"] = "test"
    records: Positive = 200  # at most; of text, so many documents (`--lengths`, `--icl`)
    samples: Positive = 1
    temperature: Annotated[float, Field(ge=1e-6)] | None = None  # of several samples; None: 0.8
    pass_at: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    max_new_tokens: Positive | None = None  # of an answer; None: as many as the longest gold one

    conditional: ClassVar = (
        Conditional("text_rows", 32, lambda s: s.text is not None, "a recipe without evaluation.text"),
        Conditional("temperature", 0.8, lambda s: s.samples > 1, "one sample, which is greedy (samples: 1)"),
    )

    @model_validator(mode="after")
    def _enough_samples(self):
        for k in self.pass_at:
            if k > self.samples:
                raise Bad("pass_at", f"{k}: exceeds samples, {self.samples}")
        return self
