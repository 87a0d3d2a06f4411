"""Hugging Face `Trainer` with what recurrence adds: parameter groups, per-sweep losses, honest FLOPs, a stop on NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from undertow.recipe import Training
from undertow.training import checkpoints
from undertow.training.precision import uses_bfloat16


def arguments(
    settings: Training,
    folder: Path,
    max_steps: int,
    seed: int,
    device: torch.device,
    eval_batch_size: int = 8,
    in_order: bool = False,
) -> TrainingArguments:
    """The `TrainingArguments` of a recipe's `training` section; checkpoints go to `folder`.

    With `in_order` the rows are read as they come, as a stream wants it, not shuffled.
    """
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup * max_steps),
        **_fall(settings, max_steps),
        max_grad_norm=settings.clip,
        bf16=uses_bfloat16(settings.precision, device),
        use_cpu=device.type == "cpu",
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN stops training instead
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=settings.keep,
        eval_strategy="no",  # the Curve callback asks for evaluations at its own steps
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="sequential" if in_order else "random",
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process drives one device: DataParallel would split the memory; use torchrun
    return made


def _fall(settings: Training, max_steps: int) -> dict[str, Any]:
    """How the learning rate falls after the warm-up, in Hugging Face's words."""
    if settings.decay == "constant":
        return {"lr_scheduler_type": "constant_with_warmup"}
    if settings.decay == "cosine":
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": settings.floor}}
    after = max_steps - round(settings.warmup * max_steps)
    falling = after if settings.decay == "linear" else min(after, round(settings.cooldown * max_steps))
    keywords = {"num_decay_steps": falling, "decay_type": "linear", "min_lr_ratio": settings.floor}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": keywords}


class UndertowTrainer(Trainer):
    """`Trainer` for an `UndertowForCausalLM`.

    Args:
        optimiser: makes the optimiser of a model.
        flops_per_row: training FLOPs of one row; `state.total_flos` adds them up.
        measure: `measure(model) -> {name: number}`, run where an evaluation is asked for.

    Raises (from `train`):
        FloatingPointError: the loss or the gradient is not finite; the weights of that step are not saved.
        OSError: the disk is full; older checkpoints stay whole.
    """

    model: Any  # the base class allows None; ours is always given

    def __init__(
        self,
        *args,
        optimiser: Callable[[Any], torch.optim.Optimizer],
        flops_per_row: float = 0.0,
        measure=None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.folder = Path(str(self.args.output_dir))  # of the checkpoints
        self.remove_callback(PrinterCallback)
        self.make_optimiser, self.flops_per_row, self.measure = optimiser, flops_per_row, measure
        self._parts: dict[str, list[torch.Tensor]] = {}  # losses of sweeps and of heads since the last log

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimiser(self.model if model is None else model)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # A micro-batch whose loss was divided by the whole batch's labels shows its share of it.
        share = 1 if num_items_in_batch is None else self.args.gradient_accumulation_steps
        if model.training and outputs.sweep_losses is not None and len(outputs.sweep_losses) > 1:
            self._parts.setdefault("sweep_loss", []).append(outputs.sweep_losses.detach().float() * share)
        if model.training and outputs.future_losses is not None:
            self._parts.setdefault("future_loss", []).append(outputs.future_losses.detach().float() * share)
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed from the last checkpoint: the base class would
            self.control.should_training_stop = True  # take one step too many before it looks
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged("loss", loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise self._diverged("gradient norm", norm)
        return norm

    def _diverged(self, what: str, value) -> FloatingPointError:
        last = checkpoints.newest_complete(self.folder)
        return FloatingPointError(
            f"step {self.state.global_step + 1}: the {what} is {float(value)}; training stopped, the last good "
            f"checkpoint is {last or 'none'}; a lower training.learning_rate or training.clip may help"
        )

    def floating_point_ops(self, inputs) -> int:
        return round(self.flops_per_row * len(inputs["input_ids"]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, seen in self._parts.items():
                logs.update({f"{name}_{i}": value for i, value in enumerate(torch.stack(seen).mean(0).tolist())})
            self._parts.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Run `measure` on the model; its numbers are logged under `eval_`."""
        was_training = self.model.training
        self.model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(self.model).items()}
        self.model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _issue_warnings_after_load(self, load_result) -> None:
        tied = self.model.all_tied_weights_keys  # saved once, under the other name
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.folder) / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml

    def _save_checkpoint(self, model, trial) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = self.folder / f"checkpoint-{self.state.global_step}"
            full = checkpoints.disk_full(error, folder)
            if full is None:
                raise
            raise full from error
