"""Hugging Face `Trainer` with what recurrence adds (parameter groups, per-sweep losses, honest FLOPs), and with what a
run needs that loses nothing: checkpoints that are whole or not there, and a stop, or a skip, at NaN."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import safe_globals

from undertow.recipe import Training
from undertow.recipe_base import one_line
from undertow.training import checkpoints
from undertow.training.precision import uses_bfloat16

KEPT = 5  # batches kept for inspection
PATIENCE = 20  # steps left out one after another before training stops anyway


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
        logging_nan_inf_filter=False,  # a NaN stops training, or its step is left out
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
        return {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": settings.value("floor")},
        }
    after = max_steps - round(settings.warmup * max_steps)
    falling = after if settings.decay == "linear" else min(after, round(settings.value("cooldown") * max_steps))
    keywords = {"num_decay_steps": falling, "decay_type": "linear", "min_lr_ratio": settings.value("floor")}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": keywords}


class UndertowTrainer(Trainer):
    """`Trainer` for an `UndertowForCausalLM`.

    Args:
        optimiser: makes the optimiser of a model.
        flops_per_row: training FLOPs of one row; `state.total_flos` adds them up.
        measure: `measure(model) -> {name: number}`, run where an evaluation is asked for.
        skip: leave out a step whose loss or gradient is not finite, and count it (`skipped` in the logs): weights and
            optimiser stay as they are, the learning rate goes on. False: such a step ends training.
        skip_logits: train without ever holding all logits (see `undertow.loss`).

    Raises (from `train`):
        FloatingPointError: the loss, the gradient or a weight is not finite; nothing of that step is saved but its
            batch, for inspection, in `nonfinite/` beside the checkpoints.
    """

    model: Any  # the base class allows None; ours is always given

    def __init__(
        self,
        *args,
        optimiser: Callable[[Any], torch.optim.Optimizer],
        flops_per_row: float = 0.0,
        measure=None,
        skip: bool = False,
        skip_logits: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.folder = Path(str(self.args.output_dir))  # of the checkpoints
        self.remove_callback(PrinterCallback)
        self.make_optimiser, self.flops_per_row, self.measure, self.skip = optimiser, flops_per_row, measure, skip
        self.skip_logits = skip_logits
        self._parts: dict[str, list[torch.Tensor]] = {}  # losses of sweeps and of heads since the last log
        self._skipped, self._in_a_row = 0, 0  # steps left out since the last log; and one after another
        self._last_logged = 0  # step
        self._step = _Step()
        self._saving = False  # a checkpoint, now
        self._resumed: Path | None = None  # the checkpoint that was just loaded

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimiser(self.model if model is None else model)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.skip_logits and model.training:
            inputs = inputs | {"skip_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # A micro-batch whose loss was divided by the labels of all micro-batches and processes shows its share of them.
        share = 1 if num_items_in_batch is None else self.args.gradient_accumulation_steps * self.args.world_size
        if model.training and outputs.sweep_losses is not None and len(outputs.sweep_losses) > 1:
            self._parts.setdefault("sweep_loss", []).append(outputs.sweep_losses.detach().float() * share)
        if model.training and outputs.future_losses is not None:
            self._parts.setdefault("future_loss", []).append(outputs.future_losses.detach().float() * share)
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args, **kwargs) -> None:
        if self._resumed is not None:
            self._take_up(self._resumed)
            self._resumed = None
        if self.state.global_step >= self.state.max_steps:  # resumed from the last checkpoint: the base class would
            self.control.should_training_stop = True  # take one step too many before it looks
            return
        super()._run_epoch(*args, **kwargs)

    # ------------------------------------------------------------------ what is not finite

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step.number != self.state.global_step:
            self._step = _Step(
                self.state.global_step, self._tr_loss.clone(), {k: len(v) for k, v in self._parts.items()}
            )
        self._step.inputs.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            if not self.skip:
                raise self._diverged("loss", loss)
            self._step.loss = float(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        what, value = ("gradient norm", norm) if self._step.loss is None else ("loss", self._step.loss)
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(value)))
        if self._anywhere(not finite):
            if not self.skip:
                raise self._diverged(what, value)
            self._leave_out(model, what, value)
            return None
        self._in_a_row = 0
        return norm

    def _leave_out(self, model, what: str, value) -> None:
        """No update of this step: an optimiser passes over parameters without gradient. Its losses are not logged."""
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        if self._in_a_row == PATIENCE:
            raise self._diverged(what, value, f"{PATIENCE} steps in a row were left out; ")
        self._keep_batch(what, value)
        model.zero_grad(set_to_none=True)
        self._tr_loss = self._step.loss_before
        for name, seen in self._parts.items():
            del seen[self._step.parts_before.get(name, 0) :]

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.args.world_size == 1:
            return here
        flag = torch.tensor(float(here), device=self.args.device)
        return bool(self.accelerator.reduce(flag) > 0)

    def _diverged(self, what: str, value, more: str = "") -> FloatingPointError:
        batch, last = self._keep_batch(what, value), checkpoints.newest_complete(self.folder)
        return FloatingPointError(
            f"step {self._step.number + 1}: the {what} is {float(value)}; {more}training stopped, the last good "
            f"checkpoint is {last or 'none'}, the batch is {batch or 'not kept'}; a lower training.learning_rate or "
            "training.clip may help, training.nonfinite=skip leaves such steps out"
        )

    def _keep_batch(self, what: str, value) -> Path | None:
        """Write the micro-batches of this step, as `0.input_ids` and so on; the first few times only."""
        folder, rank = self.folder.parent / "nonfinite", self.args.process_index
        path = folder / f"step-{self._step.number + 1}{f'-rank{rank}' if rank else ''}.safetensors"
        if not self._step.inputs or (len(list(folder.glob("*.safetensors"))) >= KEPT and not path.exists()):
            return None
        tensors = {
            f"{i}.{name}": value.detach().cpu().contiguous()
            for i, inputs in enumerate(self._step.inputs)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        folder.mkdir(exist_ok=True)
        save_file(tensors, path, {"step": str(self._step.number + 1), "what": what, "value": str(float(value))})
        return path

    # ------------------------------------------------------------------ logs

    def floating_point_ops(self, inputs) -> int:
        return round(self.flops_per_row * len(inputs["input_ids"]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, seen in self._parts.items():
                logs.update({f"{name}_{i}": value for i, value in enumerate(self._means(seen))})
            self._parts.clear()
            if self._skipped:
                steps = self.state.global_step - self._last_logged
                logs["skipped"], self._skipped = self._skipped, 0
                if logs["skipped"] == steps:
                    del logs["loss"]  # the loss of no step
                else:
                    logs["loss"] *= steps / (steps - logs["skipped"])
            self._last_logged = self.state.global_step
        super().log(logs, start_time)

    def _means(self, seen: list[torch.Tensor]) -> list[float]:
        """Of the first loss of each forward, of the second ...: forwards of drawn depths have different numbers."""
        longest = max(map(len, seen))
        means = torch.stack([torch.stack([part[i] for part in seen if len(part) > i]).mean() for i in range(longest)])
        return self.accelerator.reduce(means, "mean").tolist()  # each process saw its rows

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

    def _get_output_dir(self, trial) -> str:
        return str(self.folder / checkpoints.PART if self._saving else self.folder)

    def _save_checkpoint(self, model, trial) -> None:
        if not self.is_fsdp_enabled and not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self._diverged("largest weight", "nan")
        target = self.folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.begin(target)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._leave_for_later(self.folder / checkpoints.PART / target.name)
            if self.args.should_save:
                rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                said = json.dumps({"rows": rows, "processes": self.args.world_size})
                (self.folder / checkpoints.PART / target.name / checkpoints.STEP).write_text(said, encoding="utf-8")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.finish(target)
                checkpoints.rotate(self.folder, self.state.global_step, self.args.save_total_limit or 1)
        except BaseException:
            checkpoints.abandon(target)  # a full disk has room again
            raise
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()

    def _leave_for_later(self, folder: Path) -> None:
        """Write into a checkpoint what was summed up since the last log: the next one is the mean of all of it."""
        if self.state.global_step > self._globalstep_last_logged:
            parts = {name: [part.tolist() for part in seen] for name, seen in self._parts.items() if seen}
            left = {"loss": self._tr_loss.item(), "since": self._globalstep_last_logged, "parts": parts}
            path = folder / f"unlogged_{self.args.process_index}.json"
            path.write_text(json.dumps(left | {"skipped": self._skipped}), encoding="utf-8")

    def _take_up(self, folder: Path) -> None:
        """Go on from those sums; where another number of processes left them, each takes their mean."""
        paths = sorted(folder.glob("unlogged_*.json"))
        self._last_logged = self.state.global_step
        if not paths:
            return
        if len(paths) == self.args.world_size:
            paths = [folder / f"unlogged_{self.args.process_index}.json"]
        left = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        self._tr_loss += sum(one["loss"] for one in left) / len(left)
        self._last_logged = self._globalstep_last_logged = left[0]["since"]
        self._parts = {
            name: [torch.tensor(same, device=self.args.device).mean(0) for same in zip(*every, strict=True)]
            for name in left[0]["parts"]
            if (every := [one["parts"][name] for one in left])
        }
        self._skipped = left[0]["skipped"]

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with _loading(checkpoint):  # with `weights_only`, as everything of a checkpoint: no pickled code ever runs
            super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed = None if checkpoint is None else Path(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        with _loading(checkpoint):
            super()._load_rng_state(checkpoint)
            if checkpoint is not None:
                self._draw_on(Path(checkpoint))

    def _draw_on(self, checkpoint: Path) -> None:
        """A process that has no generator's state here (another number of them saved) goes on from the first's."""
        name = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
        if not (checkpoint / name).exists():
            first = min(checkpoint.glob("rng_state*.pth"))  # rng_state.pth of one process, rng_state_0.pth of several
            with safe_globals():
                torch.random.set_rng_state(torch.load(first, weights_only=True)["cpu"])

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with _loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)


@contextmanager
def _loading(checkpoint) -> Iterator[None]:
    """What torch raises about states that are not this run's, as one ValueError."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = one_line(error)[:300]
        raise ValueError(f"{checkpoint}: holds no states of this run: {type(error).__name__}: {said}") from error


@dataclass
class _Step:
    """The step in progress: what it read, and what was summed up before it."""

    number: int = -1  # optimiser steps done before
    loss_before: torch.Tensor = field(default_factory=lambda: torch.tensor(0.0))
    parts_before: dict[str, int] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)  # of its micro-batches
    loss: float | None = None  # of a micro-batch, if it was not finite
