"""One model class for every method on every backbone: a plain Hugging Face causal LM to the outside."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from undertow.backbone import Backbone, family_of
from undertow.cache import UndertowCache
from undertow.config import UndertowConfig
from undertow.edges import Program, compile_program
from undertow.execute import Executor
from undertow.frames import Readout, Sequence, Trace
from undertow.future import FutureHeads
from undertow.generating import Generating
from undertow.hidden import Recording
from undertow.in_memory import announce
from undertow.inputs import checked_labels, memory_mask_for, sequence
from undertow.loss import nats, share
from undertow.methods.base import Method, Parts
from undertow.output import UndertowOutput
from undertow.outside import Outside
from undertow.plan import each_layer_once
from undertow.schedules import Converge, Schedule, Sequential
from undertow.store import overwrite, take, write
from undertow.versions import one_cache

if TYPE_CHECKING:
    from undertow.exits import Exit

__all__ = ["UndertowConfig", "UndertowForCausalLM", "UndertowOutput", "from_scratch", "wrap"]


class UndertowForCausalLM(Outside, Generating, GenerationMixin):
    """A backbone run by a plan with edges: `backbone.*` is Hugging Face's own model, `undertow.*` are our modules.

    In training the default schedule is the method's (`model.schedule`), in evaluation the exact one, `Converge()`.

    Args:
        config: see `UndertowConfig`.
        backbone: an existing model to run on (its own tensors, not a copy); None builds one with random weights.

    Raises:
        ValueError: an unsupported backbone, or a method that does not fit it.
    """

    def __init__(self, config: UndertowConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        family_of(config.get_text_config().model_type)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone) if backbone is None else backbone
        self.view = Backbone(self.backbone)
        shape = self.view.shape
        self.depth, self.time = config.methods()
        depth, self.time_parts = (m.build(shape, config.retrofit) if m else Parts() for m in (self.depth, self.time))
        self.view.blank = self.time_parts.mark
        self.undertow = nn.ModuleDict({**depth.modules, **self.time_parts.modules})
        if config.future is not None:
            vocabulary = config.get_text_config().vocab_size
            self.undertow["future"] = FutureHeads.of(config.future, shape.width, vocabulary)
        self.program: Program = self._compiled(depth)
        self._programs: dict = {}  # loop count -> program, where it is not the method's own
        self.schedule: Schedule = self.time_parts.schedule or Converge()
        self.checkpointing = False
        # Ours initialise themselves and a given backbone is what it is: post_init must not draw again. A backbone built
        # here stays open, since loading must fill in what checkpoints leave out (rotary frequencies).
        for module in (self.undertow if backbone is None else self).modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # Hugging Face's own flag
        self.post_init()
        self._tp_plan = None  # layers are called one by one: no tensor parallelism, and no warning at each load
        announce(self)

    @property
    def _heads(self) -> FutureHeads:
        return cast(FutureHeads, self.undertow["future"])

    def _compiled(self, depth: Parts) -> Program:
        time, shape = self.time_parts, self.view.shape
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: UndertowCache | None = None,
        **kwargs,
    ) -> UndertowOutput | tuple:
        """Run the model on `T` new positions.

        Args:
            input_ids: `_BT` (or `inputs_embeds`, `_BTD`).
            attention_mask: `_BK`, 0 at pads; K counts cached positions too. Pads leave zero memory.
            position_ids: `_BT`; derived from `attention_mask` if not given. A 0 starts a document: memory and attention
                begin anew there, so packed documents are as good as separate ones.
            labels: `_BT`, shifted inside, -100 is ignored.
            memory_mask: `_BT`, 0 where delay-1 targets stay unmixed (the memory left there is the plain source). If not
                given the method says (`inputs.memory_mask_for`).
            schedule: overrides the default of the mode.
            num_items_in_batch: what the loss is divided by, if not the number of labels in this batch.
            prefix_mask: `_BT`, 1 where a prompt may be read in both directions by the parts of the model that can.
            loops: rounds of the depth method, if not its own (with labels in training, methods may draw it).
            exit_rule: when a token has had enough rounds (decoding, token by token; see `undertow.exits`).
            skip_logits: with labels, return no logits and never hold all of them (see `undertow.loss`).
            output_hidden_states: also return `hidden_states`, see `UndertowOutput` (None: as `config` says).
            output_attentions: not to be had (ValueError): a visit attends anew in every sweep.
            return_dict: False for a plain tuple of what is not None (None: as `config` says).
            cache: newer transformers' name of `past_key_values`.
            kwargs: not read; trainers pass what some other model needs.

        Raises:
            ValueError: inputs whose shapes do not fit each other, or a cache of another class.
        """
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions=True: weights are not kept, since visits attend anew in every sweep")
        hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if hidden and exit_rule is not None:
            raise ValueError("output_hidden_states=True with exit_rule: tokens do not run the same visits")
        cache = one_cache(past_key_values, cache)
        if cache is not None and not isinstance(cache, UndertowCache):
            kind = type(cache).__name__
            raise ValueError(
                f"past_key_values is a {kind}: only UndertowCache, which also holds the memory, is allowed (tuned "
                "prefixes of keys and values are not; prompt tuning and adapters are)"
            )
        if loops is None and self.training and self.depth is not None:
            loops = self.depth.draw()
        program = self.program_for(loops)
        if use_cache is None:
            use_cache = cache is not None or (config.use_cache and not self.training)
        if use_cache and cache is None:
            cache = UndertowCache(program.slots)
        past = 0 if cache is None else cache.length
        new = input_ids if inputs_embeds is None else inputs_embeds
        masked = memory_mask is not None or (cache is not None and cache.masked)
        if memory_mask is None and new is not None:
            memory_mask = memory_mask_for(self.time_parts, input_ids, new, masked=masked)
        seq, documents_BK = sequence(
            self.view, program, input_ids, inputs_embeds, attention_mask, position_ids, memory_mask, prefix_mask, cache
        )
        T = len(seq.everywhere)
        labels = checked_labels(labels, seq.x_BTD.shape[:2], prefix_mask)
        schedule = schedule or (self.schedule if self.training else Converge())
        if T == 1 and past:
            schedule = Sequential()  # one new token: every schedule computes the same, this one at once
        executor = (Recording if hidden else Executor)(program, self.view, self.undertow, self.checkpointing)
        if exit_rule is not None:
            trace = exit_rule.run(executor, seq)
        elif program.memories and torch.compiler.is_compiling():
            trace = _uncompiled(executor, seq, schedule)
        else:
            trace = executor.run(seq, schedule)
        if use_cache:
            assert cache is not None
            cache.commit(trace.written, trace.memory_BTND, documents_BK, T)
            cache.masked = masked

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
        out = UndertowOutput(
            loss=loss,
            logits=logits,
            cache=cache if use_cache else None,
            sweep_losses=sweep_losses,
            memory=memory if memory is None or memory.shape[2] > 1 else memory[:, :, 0],
            residual=trace.residual,
            passes=trace.passes,
            future_losses=ahead,
            rounds=trace.rounds_BT,
            last_hidden_state=h_BTD,
            hidden_states=executor.states(seq, _last(trace)) if isinstance(executor, Recording) else None,
        )
        return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _outputs(self, trace: Trace, labels, logits_to_keep, num_items_in_batch, T: int, skip_logits=False):
        """`(loss, sweep_losses, merged logits, merged states)`; the head runs only on what is asked for."""
        if labels is None:
            h_BTD = _last(trace)
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


@torch.compiler.disable
def _uncompiled(executor: Executor, seq: Sequence, schedule: Schedule) -> Trace:
    """Sweeps, which are another program for every length and number of rounds: `torch.compile(model)` breaks here."""
    return executor.run(seq, schedule)


def _present(x: Tensor | None) -> Tensor:
    assert x is not None, "the program watches a block"
    return x


def _last(trace: Trace) -> Tensor:
    """What the LM head reads, `_BTD`."""
    return _merge(trace.readouts, [r.h_BSD for r in trace.readouts])


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


# Tools know a causal language model by the name of its class.
AutoConfig.register("undertow", UndertowConfig, exist_ok=True)
AutoModelForCausalLM.register(UndertowConfig, UndertowForCausalLM, exist_ok=True)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["undertow"] = UndertowForCausalLM.__name__
