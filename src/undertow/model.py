"""One model class for every method on every backbone: a plain Hugging Face causal LM to the outside."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from undertow import card
from undertow.backbone import Backbone, family_of
from undertow.backbone.attention import kind_of
from undertow.cache import UndertowCache
from undertow.config import UndertowConfig
from undertow.edges import Program, compile_program
from undertow.execute import Executor
from undertow.frames import Readout, Trace
from undertow.future import FutureHeads
from undertow.headless import Decoder
from undertow.inputs import checked_labels, sequence
from undertow.loss import nats, share
from undertow.methods.base import Method, Parts
from undertow.output import UndertowOutput
from undertow.plan import each_layer_once
from undertow.schedules import Converge, Schedule, Sequential
from undertow.store import overwrite, take, write

if TYPE_CHECKING:
    from undertow.exits import Exit

__all__ = ["UndertowConfig", "UndertowForCausalLM", "UndertowOutput", "from_scratch", "wrap"]


class UndertowForCausalLM(PreTrainedModel, GenerationMixin):
    """A backbone run by a plan with edges: `backbone.*` is Hugging Face's own model, `undertow.*` are our modules.

    In training the default schedule is the method's (`model.schedule`), in evaluation the exact one, `Converge()`.

    Args:
        config: see `UndertowConfig`.
        backbone: an existing model to run on (its own tensors, not a copy); None builds one with random weights.

    Raises:
        ValueError: an unsupported backbone, or a method that does not fit it.
    """

    config_class = UndertowConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the backbone's own class decides
    main_input_name = "input_ids"

    def __init__(self, config: UndertowConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        family_of(config.get_text_config().model_type)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone) if backbone is None else backbone
        self.view = Backbone(self.backbone)
        shape = self.view.shape
        self.depth, self.time = config.methods()
        depth, self._over_time = (m.build(shape, config.retrofit) if m else Parts() for m in (self.depth, self.time))
        self.view.blank = self._over_time.mark
        self.undertow = nn.ModuleDict({**depth.modules, **self._over_time.modules})
        if config.future is not None:
            vocabulary = config.get_text_config().vocab_size
            self.undertow["future"] = FutureHeads.of(config.future, shape.width, vocabulary)
        self.program: Program = self._compiled(depth)
        self._programs: dict = {}  # loop count -> program, where it is not the method's own
        self.schedule: Schedule = self._over_time.schedule or Converge()
        self.checkpointing = False
        # Ours initialise themselves and a given backbone is what it is: post_init must not draw again. A backbone built
        # here stays open, since loading must fill in what checkpoints leave out (rotary frequencies).
        for module in (self.undertow if backbone is None else self).modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # Hugging Face's own flag
        self.post_init()
        self._tp_plan = None  # layers are called one by one: no tensor parallelism, and no warning at each load

    @property
    def _heads(self) -> FutureHeads:
        return cast(FutureHeads, self.undertow["future"])

    def _compiled(self, depth: Parts) -> Program:
        time, shape = self._over_time, self.view.shape
        return compile_program(
            depth.plan or each_layer_once(shape.layers),
            (*depth.edges, *time.edges),
            shape.layers,
            blocks=(*depth.blocks, *time.blocks),
            starts={**depth.starts, **time.starts},
            watch=None if "future" not in self.undertow else shape.layer(self._heads.source, "future source"),
        )

    def program_for(self, loops: int | tuple[int, ...] | None) -> Program:
        """The program with another loop count than the method's own (None: that one).

        Raises:
            ValueError: a model whose depth method does not loop, or a count it does not allow.
        """
        if loops is None:
            return self.program
        key = tuple(loops) if isinstance(loops, list | tuple) else loops
        if key not in self._programs:
            if self.depth is None:
                raise ValueError(f"loops={loops!r}: this model has no depth method, hence nothing that loops")
            with torch.device("meta"), torch.random.fork_rng([]):  # only the plan is of interest, not new weights
                parts = self.depth.looped(key).build(self.view.shape, self.config.retrofit)
            self._programs[key] = self._compiled(parts)
        return self._programs[key]

    # ------------------------------------------------------------------ what Hugging Face asks of a model

    def _init_weights(self, module: nn.Module):
        """Modules initialise themselves; there is nothing to add."""

    @property
    def base_model(self):
        """The model without its LM head, recurrence and all (not the bare backbone)."""
        return Decoder(self)

    def get_input_embeddings(self):
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The backbone's LM head."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        """Replace the backbone's LM head."""
        self.backbone.set_output_embeddings(new_embeddings)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        """Hugging Face's switch, for the backbone. Raises ValueError for one that the backbone cannot run with."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        kind_of(self.config._attn_implementation, self.view.family.ours)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        """Recompute each visit in backward. The layers' own switch would drop keys and values, so this is ours."""
        self.checkpointing = True

    def gradient_checkpointing_disable(self):
        """Keep what visits compute for backward."""
        self.checkpointing = False

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether visits are recomputed in backward."""
        return self.checkpointing

    is_gradient_checkpointing = is_activation_checkpointing

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As Hugging Face, and a model card. Raises ValueError for a quantised backbone: no plain tensors."""
        if getattr(self.backbone, "is_quantized", False):  # a flag only Hugging Face's quantisers set
            raise ValueError(
                "the backbone is quantised and cannot be saved with what is new: save model.undertow.state_dict() and "
                "wrap the quantised backbone again, or wrap plain weights"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        card.leave(Path(save_directory), self)

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: UndertowCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory_mask: Tensor | None = None,
        schedule: Schedule | None = None,
        num_items_in_batch: Tensor | int | None = None,
        prefix_mask: Tensor | None = None,
        loops: int | tuple[int, ...] | None = None,
        exit_rule: Exit | None = None,
        skip_logits: bool = False,
        **kwargs,
    ) -> UndertowOutput:
        """Run the model on `T` new positions.

        Args:
            input_ids: `_BT` (or `inputs_embeds`, `_BTD`).
            attention_mask: `_BK`, 0 at pads; K counts cached positions too. Pads leave zero memory.
            position_ids: `_BT`; derived from `attention_mask` if not given. A 0 starts a document: memory and attention
                begin anew there, so packed documents are as good as separate ones.
            labels: `_BT`, shifted inside, -100 is ignored.
            memory_mask: `_BT`, 0 where delay-1 targets stay unmixed (the memory left there is the plain source).
            schedule: overrides the default of the mode.
            num_items_in_batch: what the loss is divided by, if not the number of labels in this batch.
            prefix_mask: `_BT`, 1 where a prompt may be read in both directions by the parts of the model that can.
            loops: rounds of the depth method, if not its own (with labels in training, methods may draw it).
            exit_rule: when a token has had enough rounds (decoding, token by token; see `undertow.exits`).
            skip_logits: with labels, return no logits and never hold all of them (see `undertow.loss`).

        Raises:
            ValueError: inputs whose shapes do not fit each other, or a cache of another class.
        """
        if past_key_values is not None and not isinstance(past_key_values, UndertowCache):
            kind = type(past_key_values).__name__
            raise ValueError(
                f"past_key_values is a {kind}: only UndertowCache, which also holds the memory, is allowed"
            )
        if loops is None and self.training and self.depth is not None:
            loops = self.depth.draw()
        program = self.program_for(loops)
        if use_cache is None:
            use_cache = past_key_values is not None or not self.training
        cache = UndertowCache(program.slots) if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.length
        if memory_mask is None and input_ids is not None and self._over_time.mark is not None:
            memory_mask = input_ids == self._over_time.mark
        seq, documents_BK = sequence(
            self.view, program, input_ids, inputs_embeds, attention_mask, position_ids, memory_mask, prefix_mask, cache
        )
        T = len(seq.everywhere)
        labels = checked_labels(labels, seq.x_BTD.shape[:2], prefix_mask)
        schedule = schedule or (self.schedule if self.training else Converge())
        if T == 1 and past:
            schedule = Sequential()  # one new token: every schedule computes the same, this one at once
        executor = Executor(program, self.view, self.undertow, self.checkpointing)
        trace = executor.run(seq, schedule) if exit_rule is None else exit_rule.run(executor, seq)
        if use_cache:
            assert cache is not None
            cache.commit(trace.written, trace.memory_BTND, documents_BK, T)

        loss, sweep_losses, logits, h_BTD = self._outputs(
            trace, labels, logits_to_keep, num_items_in_batch, T, skip_logits
        )
        ahead = None
        if labels is not None and "future" in self.undertow:
            heads = self._heads
            watched = _merge(trace.readouts, [_present(r.watched_BSD) for r in trace.readouts])
            ahead = heads.losses(watched, labels, num_items_in_batch)
            loss = heads.trunk * loss + heads.together(ahead)
        memory = trace.memory_BTND
        return UndertowOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            sweep_losses=sweep_losses,
            memory=memory if memory is None or memory.shape[2] > 1 else memory[:, :, 0],
            residual=trace.residual,
            passes=trace.passes,
            future_losses=ahead,
            rounds=trace.rounds_BT,
            last_hidden_state=h_BTD,
        )

    def _outputs(self, trace: Trace, labels, logits_to_keep, num_items_in_batch, T: int, skip_logits=False):
        """`(loss, sweep_losses, merged logits, merged states)`; the head runs only on what is asked for."""
        if labels is None:
            h_BTD = _merge(trace.readouts, [r.h_BSD for r in trace.readouts])
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return None, None, self.view.head(h_BTD[:, keep]), h_BTD
        targets_BT = F.pad(labels[:, 1:], (0, 1), value=-100)
        N = (targets_BT != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        losses, logits = [], []
        for readout in trace.readouts:
            total, made = nats(self.view, readout.h_BSD, take(targets_BT, readout.positions), skip_logits)
            logits += [] if made is None else [made]
            losses.append(total / (share(readout.positions, T) or 1) / N)  # no share: no target, and a total of zero
        loss = sum(r.weight * x for r, x in zip(trace.readouts, losses, strict=True))
        if len(logits) < 2:
            return loss, torch.stack(losses), logits[0] if logits else None, None
        with torch.no_grad():  # of several sweeps, logits are for reading: into the first's, no copy of all of them
            merged = _merge(trace.readouts, [x.detach() for x in logits], overwrite)
        return loss, torch.stack(losses), merged, None

    # ------------------------------------------------------------------ generation, through Hugging Face's own loop

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r}: the cache also holds the memory; allowed are None and 'dynamic'"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = UndertowCache(self.program_for(model_kwargs.get("loops")).slots)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()  # its tokens may be refused

    def _sample(self, *args, **kwargs):
        """Greedy search and sampling: our own loop where it can (`undertow.decode.why_not`), else Hugging Face's."""
        from undertow.decode import decode

        return decode(self, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, memory_mask=None, prefix_mask=None, **kwargs):
        """As Hugging Face; `memory_mask` covers the prompt and is extended with ones, `prefix_mask` with zeros."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else cache.length
        if prefix_mask is not None and past == 0:
            inputs["prefix_mask"] = F.pad(prefix_mask, (0, inputs["input_ids"].shape[1] - prefix_mask.shape[1]))
        if memory_mask is not None:
            new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            mask_BT = memory_mask[:, past : past + new.shape[1]]
            inputs["memory_mask"] = F.pad(mask_BT, (0, new.shape[1] - mask_BT.shape[1]), value=1)
        return inputs


def _present(x: Tensor | None) -> Tensor:
    assert x is not None, "the program watches a block"
    return x


def _merge(readouts: tuple[Readout, ...], parts: list[Tensor], put: Callable = write) -> Tensor:
    """One tensor over all positions, each from the last read-out that has it."""
    merged = None
    for readout, part in zip(readouts, parts, strict=True):
        merged = put(merged, part, readout.positions, 1)
    assert merged is not None, "there is always a read-out"
    return merged


def wrap(
    model: PreTrainedModel,
    depth: Method | None = None,
    time: Method | None = None,
    schedule: Schedule | None = None,
    future: dict | None = None,
) -> UndertowForCausalLM:
    """Make a (pretrained) causal LM recurrent, on its own tensors: at step 0 its logits are what they were.

    Of a quantised model whose layers run several times a token a warning says that rounding errors add up.

    Args:
        model: a Hugging Face causal LM of a supported family.
        depth, time: the methods; either may be None.
        schedule: default in training (None: the time method's).
        future: heads that predict tokens further ahead, the fields of `undertow.future.FutureHeads` (None: no heads).

    Raises:
        ValueError: an unsupported family, or a method that does not fit the model.
    """
    family_of(model.config.model_type)
    config = UndertowConfig(
        backbone=model.config, depth=_dict(depth, "depth"), time=_dict(time, "time"), future=future, retrofit=True
    )
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in layers:  # the layers' own switch would drop keys and values: ours takes over
        module.gradient_checkpointing = False  # type: ignore[assignment]  # Hugging Face's own flag
    ours = UndertowForCausalLM(config, backbone=model)
    visits = Counter(step.block for step in ours.program.steps)
    if getattr(model, "is_quantized", False) and max(visits.values()) > 1:  # a flag only Hugging Face's quantisers set
        warnings.warn(
            f"the backbone is quantised and block {visits.most_common(1)[0][0]!r} runs "
            f"{max(visits.values())} times a token: what rounding loses is lost at every visit",
            stacklevel=2,
        )
    parameter = next(model.parameters())
    ours.undertow.to(device=parameter.device, dtype=parameter.dtype)
    ours.generation_config = model.generation_config
    ours.schedule, ours.checkpointing = schedule or ours.schedule, bool(layers)
    return ours.train(model.training)


def from_scratch(
    hf_config: PreTrainedConfig,
    depth: Method | None = None,
    time: Method | None = None,
    schedule: Schedule | None = None,
    future: dict | None = None,
) -> UndertowForCausalLM:
    """A model with random weights and the methods' published initialisation. Arguments and errors as `wrap`."""
    family_of(hf_config.model_type)
    config = UndertowConfig(
        backbone=hf_config, depth=_dict(depth, "depth"), time=_dict(time, "time"), future=future, retrofit=False
    )
    model = UndertowForCausalLM(config)
    model.generation_config = model.backbone.generation_config
    model.schedule = schedule or model.schedule
    return model


def _dict(method: Method | None, kind: str) -> dict | None:
    if method is None:
        return None
    if not isinstance(method, Method) or method.kind != kind:
        raise ValueError(f"{kind}={method!r}: must be a {kind} method")
    return method.to_dict()


AutoConfig.register("undertow", UndertowConfig, exist_ok=True)
AutoModelForCausalLM.register(UndertowConfig, UndertowForCausalLM, exist_ok=True)
