"""What of a model is trained: low-rank adapters (LoRA) on the backbone, and what is new before what was there."""

from __future__ import annotations

from transformers import TrainerCallback

from undertow.recipe import RecipeError
from undertow.recipe_base import one_line
from undertow.recipe_sections import Lora
from undertow.training.optimisers import OURS, trainable


def add_lora(model, settings: Lora) -> None:
    """Put adapters on the backbone's projections, in place, and freeze the rest of it; `undertow.*` stays trained.

    At the start they change nothing (B = 0, arXiv 2106.09685). Taps at keys and values act on what projection and
    adapter give together, as they will on the merged matrix.

    Raises:
        RecipeError: `peft` is not installed, or `targets` names no projection.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise RecipeError("training.lora: needs the package peft; pip install peft") from None
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(config, model.backbone)
    except ValueError as error:
        raise RecipeError(f"training.lora.targets: {settings.targets!r}: {one_line(error)}") from error


def merge_lora(model) -> None:
    """Add what the adapters learned to the matrices they sit on and take them off, in place: a plain model again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


class NewFirst(TrainerCallback):
    """For the first `share` of all steps only `undertow.*` is trained; then all that the run trains.

    FLOPs are counted as if all were trained throughout, which is more than it costs.

    Raises:
        ValueError: the model has nothing new, or nothing else is trained, or several processes train.
    """

    def __init__(self, model, share: float, processes: int = 1):
        parameters = trainable(model)
        self.share, self.later = share, [p for name, p in parameters if not name.startswith(OURS)]
        if not self.later or len(self.later) == len(parameters):
            what = "nothing is trained but" if not self.later else "there is nothing"
            raise ValueError(f"training.gates_first: {share}: {what} under {OURS.rstrip('.')!r}; leave it out")
        if processes > 1:
            raise ValueError(f"training.gates_first: {share}: {processes} processes train; allowed in one process")

    def on_step_begin(self, args, state, control, **kwargs):
        begun = state.global_step >= round(self.share * state.max_steps)
        for parameter in self.later:
            parameter.requires_grad_(begun)

    def on_train_end(self, args, state, control, **kwargs):
        for parameter in self.later:
            parameter.requires_grad_(True)
