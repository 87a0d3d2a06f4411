"""One model class for every method on every backbone: a plain Hugging Face causal LM to the outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from undertow.backbone import Backbone, family_of
from undertow.edges import Program, compile_program
from undertow.execute import Executor, Readout, Sequence, Trace
from undertow.methods.base import Method, Parts
from undertow.plan import each_layer_once
from undertow.schedules import Converge, Schedule, Sequential
from undertow.store import Masks, UndertowCache, take, write

__all__ = ["UndertowConfig", "UndertowForCausalLM", "UndertowOutput", "from_scratch", "wrap"]


class UndertowConfig(PreTrainedConfig):
    """A backbone's config and the methods on it. The schedule is a run-time choice and not part of it.

    Args:
        backbone: config of the backbone (or its dict, with `model_type`).
        depth, time: methods as `{"method": name, **fields}`, or None.
        retrofit: whether mixers are built to start as the identity (`wrap`) or as published (`from_scratch`).
    """

    model_type = "undertow"
    sub_configs = {"backbone": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "sweep_losses", "memory", "residual", "passes"]

    backbone: dict | PreTrainedConfig | None = None
    depth: dict | None = None
    time: dict | None = None
    retrofit: bool = False

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone, dict):
            self.backbone = AutoConfig.for_model(**self.backbone)
        if self.backbone is not None:  # Hugging Face hands the outer choice of attention down to the backbone
            kwargs.setdefault("attn_implementation", self.backbone._attn_implementation)
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """Sizes of the language model (what Hugging Face tools read): the backbone's config."""
        return self.backbone if isinstance(self.backbone, PreTrainedConfig) else self

    def methods(self) -> tuple[Method | None, Method | None]:
        """The depth and the time method. Raises ValueError for unknown ones."""
        return (
            None if self.depth is None else Method.from_dict(self.depth, "depth"),
            None if self.time is None else Method.from_dict(self.time, "time"),
        )


@dataclass
class UndertowOutput(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: `sum_s w_s (T/|I_s|) CE_s / N` over the schedule's read-outs (nats a token), if labels were given.
        logits: `_BTV`, each position from the last sweep that read it out.
        past_key_values: the `UndertowCache`, keys and values of every slot and the memory.
        sweep_losses: one loss a read-out, unweighted.
        memory: what each token left behind, `_BTD` (`_BTND` with N > 1 sources), None without a delay-1 edge.
        residual: of `Converge`, the relative change of the memory in the last round.
        passes: cost of the sweeps, in passes of the span over all positions.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: UndertowCache | None = None
    sweep_losses: Tensor | None = None
    memory: Tensor | None = None
    residual: float | None = None
    passes: float | None = None


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
    _supports_sdpa = True
    main_input_name = "input_ids"

    def __init__(self, config: UndertowConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        family_of(config.get_text_config().model_type)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone) if backbone is None else backbone
        self.view = Backbone(self.backbone)
        depth, time = (m.build(self.view.shape, config.retrofit) if m else Parts() for m in config.methods())
        self.undertow = nn.ModuleDict({**depth.modules, **time.modules})
        self.program: Program = compile_program(
            depth.plan or each_layer_once(self.view.shape.layers),
            (*depth.edges, *time.edges),
            self.view.shape.layers,
            blocks=(*depth.blocks, *time.blocks),
            starts={**depth.starts, **time.starts},
        )
        self.schedule: Schedule = time.schedule or Converge()
        self.checkpointing = False
        # Ours initialise themselves and a given backbone is what it is: post_init must not draw again. A backbone built
        # here stays open, since loading must fill in what checkpoints leave out (rotary frequencies).
        for module in (self.undertow if backbone is None else self).modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # Hugging Face's own flag
        self.post_init()

    # ------------------------------------------------------------------ what Hugging Face asks of a model

    def _init_weights(self, module: nn.Module):
        """Modules initialise themselves; there is nothing to add."""

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.backbone.set_output_embeddings(new_embeddings)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        """Recompute each visit in backward. The layers' own switch would drop keys and values, so this is ours."""
        self.checkpointing = True

    def gradient_checkpointing_disable(self):
        self.checkpointing = False

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.checkpointing

    is_gradient_checkpointing = is_activation_checkpointing

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

        Raises:
            ValueError: inputs whose shapes do not fit each other, or a cache of another class.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        B, T = given.shape[:2]
        if past_key_values is not None and not isinstance(past_key_values, UndertowCache):
            kind = type(past_key_values).__name__
            raise ValueError(
                f"past_key_values is a {kind}: only UndertowCache, which also holds the memory, is allowed"
            )
        for name, x in (("labels", labels), ("memory_mask", memory_mask)):
            if x is not None and tuple(x.shape) != (B, T):
                raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {(B, T)}, that of the input")
        if use_cache is None:
            use_cache = past_key_values is not None or not self.training
        cache = UndertowCache(self.program.slots) if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.length
        schedule = schedule or (self.schedule if self.training else Converge())
        if T == 1 and past:
            schedule = Sequential()  # one new token: every schedule computes the same, this one at once

        seq, documents_BK = self._sequence(input_ids, inputs_embeds, attention_mask, position_ids, memory_mask, cache)
        trace = Executor(self.program, self.view, self.undertow, self.checkpointing).run(seq, schedule)
        if use_cache:
            assert cache is not None
            memory = None if trace.memory_BTND is None else trace.memory_BTND[:, -1]
            cache.commit(trace.written, memory, documents_BK, T)

        loss, sweep_losses, logits = self._outputs(trace, labels, logits_to_keep, num_items_in_batch, T)
        memory = trace.memory_BTND
        return UndertowOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            sweep_losses=sweep_losses,
            memory=memory if memory is None or memory.shape[2] > 1 else memory[:, :, 0],
            residual=trace.residual,
            passes=trace.passes,
        )

    def _sequence(self, input_ids, inputs_embeds, attention_mask, position_ids, memory_mask, cache):
        """Everything that stays the same during the sweeps, and the document of every position so far (or None)."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        (B, T), device = given.shape[:2], given.device
        past = 0 if cache is None else cache.length
        if attention_mask is not None and tuple(attention_mask.shape) != (B, past + T):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: must be {(B, past + T)}, "
                f"{past} cached and {T} new positions, 0 at pads"
            )
        limit = self.config.backbone.max_position_embeddings
        if self.view.family.positions and past + T > limit:
            raise ValueError(f"{past + T} positions: the backbone's learned position table has {limit}")
        packed = position_ids is not None
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + T, device=device)[None]
        if position_ids.shape[-1] != T or position_ids.shape[0] not in (1, B):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: must be {(B, T)}")
        documents_BK, real_BT, inside_BT = _documents(attention_mask, position_ids if packed else None, B, T, cache)
        x_BTD = self.view.embed(input_ids, inputs_embeds, position_ids)
        entry = None if cache is None else cache.memory_BND
        if entry is None:
            entry = x_BTD.new_zeros(B, len(self.program.memories), x_BTD.shape[-1])
        seq = Sequence(
            x_BTD=x_BTD,
            rotary=self.view.rotary(x_BTD, position_ids),
            masks=Masks(T, past, documents_BK, device),
            past={} if cache is None else cache.past(),
            entry_BND=entry,
            real_BT=real_BT,
            inside_BT=inside_BT,
            memory_mask_BT=None if memory_mask is None else memory_mask.bool(),
        )
        return seq, documents_BK

    def _outputs(self, trace: Trace, labels, logits_to_keep, num_items_in_batch, T: int):
        """`(loss, sweep_losses, merged logits)`; the head runs only on what is asked for."""
        if labels is None:
            h_BTD = _merge(trace.readouts, [r.h_BSD for r in trace.readouts])
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return None, None, self.view.head(h_BTD[:, keep])
        targets_BT = F.pad(labels[:, 1:], (0, 1), value=-100)
        N = (targets_BT != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        losses, logits = [], []
        for readout in trace.readouts:
            logits.append(self.view.head(readout.h_BSD))
            scores = logits[-1].float() if logits[-1].dtype in (torch.bfloat16, torch.float16) else logits[-1]
            targets = take(targets_BT, readout.positions)
            total = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
            losses.append(total * (T / len(readout.positions)) / N)
        loss = sum(r.weight * x for r, x in zip(trace.readouts, losses, strict=True))
        return loss, torch.stack(losses), _merge(trace.readouts, logits)

    # ------------------------------------------------------------------ generation, through Hugging Face's own loop

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r}: the cache also holds the memory; allowed are None and 'dynamic'"
            )
        if "assisted" in generation_mode.value:
            raise ValueError(
                "assisted and prompt-lookup decoding are not supported yet: rejected tokens would need the memory of "
                "earlier ones; allowed are greedy search, sampling and beams"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = UndertowCache(self.program.slots)

    def prepare_inputs_for_generation(self, input_ids, memory_mask=None, **kwargs):
        """As Hugging Face; `memory_mask` covers the prompt and is extended with ones."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if memory_mask is not None:
            cache = inputs.get("past_key_values")
            past = 0 if cache is None else cache.length
            new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            mask_BT = memory_mask[:, past : past + new.shape[1]]
            inputs["memory_mask"] = F.pad(mask_BT, (0, new.shape[1] - mask_BT.shape[1]), value=1)
        return inputs


def _merge(readouts: tuple[Readout, ...], parts: list[Tensor]) -> Tensor:
    """One tensor over all positions, each from the last read-out that has it."""
    merged = None
    for readout, part in zip(readouts, parts, strict=True):
        merged = write(merged, part, readout.positions, 1)
    assert merged is not None, "there is always a read-out"
    return merged


def _documents(attention_mask, position_ids, B: int, T: int, cache: UndertowCache | None):
    """`(document_BK, real_BT, inside_BT)`; each None where it would say nothing (one document, no pads).

    `position_ids` are those the caller gave (None: derived, so only pads matter). Documents are numbered from 1 along
    each row, 0 is a pad; `inside` is False where a document starts.
    """
    past = 0 if cache is None else cache.length
    known = None if cache is None else cache.documents_BT
    mask_BT = None if attention_mask is None else attention_mask[:, -T:].bool()
    padded = mask_BT is not None and not bool(mask_BT.all())
    starts = position_ids is not None and bool((position_ids[:, 0 if past else 1 :] == 0).any())
    if known is None and past and attention_mask is not None and not bool(attention_mask[:, :past].all()):
        raise ValueError("attention_mask has pads among cached positions that were not pads when they were computed")
    if known is None and not padded and not starts:
        return None, None, None
    device = (attention_mask if attention_mask is not None else position_ids).device
    real_BT = torch.ones(B, T, dtype=torch.bool, device=device) if mask_BT is None else mask_BT
    if known is None:
        known = torch.ones(B, past, dtype=torch.long, device=device)
    newest_B1 = known.amax(1, keepdim=True) if past else torch.zeros(B, 1, dtype=torch.long, device=device)
    start_BT = torch.zeros_like(real_BT) if position_ids is None else (position_ids == 0) & real_BT
    start_BT = start_BT | (real_BT & (real_BT.cumsum(1) == 1) & (newest_B1 == 0))  # the first real token of a row
    document_BT = torch.where(real_BT, newest_B1 + start_BT.cumsum(1), 0)
    return torch.cat([known, document_BT], 1), real_BT if padded else None, ~start_BT


def wrap(
    model: PreTrainedModel, depth: Method | None = None, time: Method | None = None, schedule: Schedule | None = None
) -> UndertowForCausalLM:
    """Make a (pretrained) causal LM recurrent, on its own tensors: at step 0 its logits are what they were.

    Args:
        model: a Hugging Face causal LM of a supported family.
        depth, time: the methods; either may be None.
        schedule: default in training (None: the time method's).

    Raises:
        ValueError: an unsupported family, or a method that does not fit the model.
    """
    family_of(model.config.model_type)
    config = UndertowConfig(backbone=model.config, depth=_dict(depth, "depth"), time=_dict(time, "time"), retrofit=True)
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in layers:  # the layers' own switch would drop keys and values: ours takes over
        module.gradient_checkpointing = False  # type: ignore[assignment]  # Hugging Face's own flag
    ours = UndertowForCausalLM(config, backbone=model)
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
) -> UndertowForCausalLM:
    """A model with random weights and the methods' published initialisation. Arguments and errors as `wrap`."""
    family_of(hf_config.model_type)
    config = UndertowConfig(backbone=hf_config, depth=_dict(depth, "depth"), time=_dict(time, "time"), retrofit=False)
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
