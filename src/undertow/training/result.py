"""What a run's `result.json` says: what it was, and what was measured at its end."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from undertow.analysis import label
from undertow.data import pack_documents, token_bytes
from undertow.data.corpus import load_documents
from undertow.data.format import TextFormat
from undertow.evaluation import accuracy, bits, future, samples, speed
from undertow.recipe import Recipe, component
from undertow.schedules import Converge, Sequential
from undertow.training import budget
from undertow.training.callbacks import read_metrics


@dataclass(frozen=True)
class Loaded:
    """A trained model, how texts are read for it, and the recipe of its run."""

    model: Any
    format: TextFormat
    recipe: Recipe | None

    @property
    def tokenizer(self):
        """The format's."""
        return self.format.tokenizer


def describe(model, recipe: Recipe, steps: int, rows: int, row_flops: float) -> dict:
    """What the run was: sizes and cost. FLOPs are of all training, `layer_evaluations` of one token when decoding.

    `effective_compute` is tokens per (scaling) parameter times the schedule's multiplier; `training.budget` says how
    both are counted.
    """
    tokens, scaling = steps * rows * recipe.data.seq_len, budget.scaling_parameters(model)
    multiplier = budget.token_compute_multiplier(model, recipe.data.seq_len)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scaling_parameters": scaling,
        "layer_evaluations": budget.evaluations_per_token(model),
        "schedule": label(model.schedule),
        "steps": steps,
        "tokens": tokens,
        "tokens_per_parameter": tokens / scaling,
        "token_compute_multiplier": multiplier,
        "effective_compute": tokens / scaling * multiplier,
        "training_flops": steps * rows * row_flops,
    }


def environment(device: torch.device) -> dict[str, str]:
    """Where a run was made: versions, machine and device, in words."""
    names = ("undertow", "torch", "transformers", "accelerate")
    found = {name: metadata.version(name) for name in names} | {"python": platform.python_version()}
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found["threads"] = str(torch.get_num_threads())
    return found


def measure(loaded: Loaded, data, schedules: Sequence[str] = ()) -> dict:
    """Bits per byte under the training schedule, under true decoding and under `schedules`; speed; samples; of a task
    its accuracy (`solved`: the share of its records that are, by generation where there is something to write).

    Args:
        schedules: more schedules, as one types them (`"Cyclic(16, 2)"`).
    """
    if loaded.recipe is None:
        raise ValueError("measure: the model comes with no recipe, so its evaluation settings are unknown")
    model, settings, rows = loaded.model, loaded.recipe.evaluation, data.validation
    on_task = accuracy.wanted(data, settings)

    def bits_under(schedule) -> dict:
        return bits.bits_per_byte(
            model, rows, data.token_bytes, schedule, settings.batch_size, settings.precision
        ).to_dict()

    trained = bits_under(model.schedule)
    result = {
        "bits_training": trained["bits_per_byte"],
        "bits_true": None,
        "evaluations": {label(model.schedule): trained},
    }
    # A model without a state over time is trained under Converge() too, which is one sweep then: measured once.
    others = [
        Converge(),
        *([Sequential()] if settings.sequential else []),
        *(component("schedule", text) for text in schedules),
    ]
    for schedule in others:
        if label(schedule) not in result["evaluations"]:
            result["evaluations"][label(schedule)] = bits_under(schedule)
    result["bits_true"] = result["evaluations"][label(Converge())]["bits_per_byte"]
    if model.config.future is not None:
        result["future"] = future.future_losses(model, rows, model.schedule, settings.batch_size)
    ids = torch.as_tensor(rows[0]["input_ids"])
    prompts = settings.prompts or (_first_prompt(data, ids[:16]),)
    result["generation_tokens_per_second"] = speed.generation_speed(model, ids[:32], settings.new_tokens)
    result["samples"] = [
        {"prompt": prompt, "text": samples.sample(model, loaded.format, prompt, settings.new_tokens)}
        for prompt in prompts
    ]
    if settings.text is not None:
        result["bits_text"] = _bits_of_text(loaded.recipe, model, loaded.format)
    if on_task:
        found = result["accuracy"] = accuracy.measure(model, data, settings)
        result["solved"] = found.get("generated", found["exact"])["accuracy"]
    return result


def _first_prompt(data, ids) -> str:
    """What to go on from where the recipe does not say: a prompt of the task, else the beginning of a text."""
    if data.task is not None and data.task.kind == "answers":
        return data.task.example(next(iter(data.task.records("validation")))).prompt
    return data.tokenizer.decode(ids, skip_special_tokens=True)


def _bits_of_text(recipe: Recipe, model, form: TextFormat) -> float:
    """Bits per byte of the recipe's `evaluation.text` under true decoding, in rows as long as those of training."""
    settings = recipe.evaluation
    documents = load_documents(settings.text or ())
    rows: Any = pack_documents(documents, form, recipe.data.seq_len, recipe.data.cache_dir).head(
        settings.value("text_rows")
    )
    found = bits.bits_per_byte(
        model, rows, token_bytes(form.tokenizer), Converge(), settings.batch_size, settings.precision
    )
    return found.bits_per_byte


def training_speed(folder: Path) -> float | None:
    """The median of the logged tokens per second (the first log includes warming up)."""
    logged = [m["tokens_per_second"] for m in read_metrics(folder / "metrics.jsonl") if "tokens_per_second" in m]
    return statistics.median(logged[1:] or logged) if logged else None
