"""One run: a folder with the resolved recipe, metrics, checkpoints, the model and what was measured.

runs/NAME-N/recipe.yaml          every value, defaults written out
            metrics.jsonl        one line a log: step, tokens, flops, loss, ...
            tensorboard/         the same, as events
            checkpoints/         Hugging Face Trainer's, safetensors, the newest few
            data.json            which texts it is trained and validated on (`training.kept`)
            model/               the trained model, its tokenizer and a model card; loads with `from_pretrained`
            result.json          what was measured at the end; its presence says that the run is finished
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, TrainerCallback

from undertow import card
from undertow import recipe as recipes
from undertow.backbone.attention import attend
from undertow.backbone.pretrained import load_backbone
from undertow.data import Data, cache, check_vocabulary, collate
from undertow.data.corpus import load_documents
from undertow.data.pause import Paused, Pauses, token_id
from undertow.data.tokenizer import vocabulary_size
from undertow.data.tokenizer_files import read_tokenizer
from undertow.evaluation import bits
from undertow.model import UndertowForCausalLM, from_scratch, wrap
from undertow.recipe import Recipe, RecipeError
from undertow.recipe_base import one_line
from undertow.tasks import Task
from undertow.training import adapters, budget, checkpoints, kept, optimisers, signals, trackers, trainer, visits
from undertow.training.callbacks import Clock, Curriculum, Curve, Leave, Metrics, read_metrics
from undertow.training.compiling import compiled
from undertow.training.kept import absolute, reopen
from undertow.training.kept import open_data as open_data
from undertow.training.precision import device_of, parallel
from undertow.training.result import Loaded, describe, environment, measure, training_speed
from undertow.training.resuming import same_rows, same_run
from undertow.training.statistics import Statistics

BEGUN = {"recipe.yaml", kept.DATA}  # what a run writes before it trains


def pick_folder(name: str, folder: Path | None = None, resume: bool = False, root: Path = Path("runs")) -> Path:
    """A folder for something called `name`, made if need be.

    Args:
        folder: None takes `root/NAME-N`: the newest with `resume`, else the next free number.
        resume: what lies in the folder is continued.

    Raises:
        ValueError: `folder` is not empty (without `resume`).
        FileNotFoundError: there is nothing to resume.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one process chooses, all agree
        chosen = [_pick(name, folder, resume, root) if parallel().is_main_process else None]
        return broadcast_object_list(chosen)[0]
    return _pick(name, folder, resume, root)


def _pick(name: str, folder: Path | None, resume: bool, root: Path) -> Path:
    numbers = [int(n) for path in root.glob(f"{name}-*") if (n := path.name[len(name) + 1 :]).isdigit()]
    if folder is None and resume:
        if not numbers:
            raise FileNotFoundError(f"--resume: there is no {root}/{name}-N to continue")
        return root / f"{name}-{max(numbers)}"
    if folder is None:
        folder = root / f"{name}-{max(numbers, default=0) + 1}"
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise ValueError(f"{folder} is not empty; --resume continues what lies there, --out names another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def folder_for(
    recipe: recipes.Run, folder: Path | None = None, resume: bool = False, root: Path = Path("runs")
) -> Path:
    """The folder of a run (see `pick_folder`), with its recipe in it.

    Raises:
        ValueError: with `resume`, the folder's recipe says another model, other data or other training (how the
            rows of a step are dealt out may change with the number of processes); a tracker that it asks for is not
            installed; its `evaluation.text` cannot be read.
    """
    if isinstance(recipe, Recipe):
        trackers.check(recipe.training.report_to)
        if recipe.evaluation.text is not None:
            load_documents(recipe.evaluation.text)  # it is read when training is over: a mistyped name is said now
    recipe = absolute(recipe)
    folder = pick_folder(recipe.name, folder, resume, root)
    with parallel().main_process_first():
        if (folder / "recipe.yaml").exists():
            same_run(absolute(recipes.load_any(folder)), recipe, folder, same_rows(recipe, folder))
        if parallel().is_main_process:
            cache.write(folder / "recipe.yaml", lambda file: file.write(recipe.to_yaml().encode()))
    return folder


@contextmanager
def nothing_left(folder: Path, resume: bool) -> Iterator[None]:
    """What cannot begin leaves no folder: an error takes one away that was just made and holds nothing trained."""
    try:
        yield
    except (ValueError, OSError):
        if not resume and parallel().is_main_process and {path.name for path in folder.iterdir()} <= BEGUN:
            shutil.rmtree(folder)
        raise


def training_rows(recipe: Recipe, rows, tokenizer):
    """The rows to train on, with the recipe's pauses. Raises ValueError: the pause token is not in the vocabulary."""
    pause = recipe.data.pause
    if pause is None:
        return rows
    token = token_id(tokenizer, pause.token)
    return Paused(rows, Pauses(token, pause.mean, pause.replace, pause.seed, pause.only_recurrent))


def build_model(recipe: Recipe, tokenizer=None):
    """The model of a recipe: random weights drawn from its seed, or the pretrained ones, made recurrent.

    Args:
        tokenizer: gives a model from scratch its vocabulary and special tokens; None takes the task's own, else
            `data.vocab_size`.

    Raises:
        ValueError: tokenizer, rows, methods and model do not fit each other.
    """
    torch.manual_seed(recipe.seed)
    if tokenizer is None and recipe.data.tokenizer is None and isinstance(recipe.data.source, Task):
        tokenizer = recipe.data.source.tokenizer()
    base, parts = recipe.backbone, {"depth": recipe.depth, "time": recipe.time, "schedule": recipe.schedule}
    lm = None
    if base.pretrained is not None:
        lm = load_backbone(base.pretrained, base.revision)
        config = lm.config
    elif tokenizer is None:
        config = base.hf_config(vocab_size=recipe.data.value("vocab_size"))
    else:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = base.hf_config(vocab_size=vocabulary_size(tokenizer), **special)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    if recipe.data.seq_len > config.max_position_embeddings:
        raise RecipeError(
            f"data.seq_len: {recipe.data.seq_len} exceeds the backbone's {config.max_position_embeddings} positions"
        )
    parts["future"] = None if recipe.future is None else recipe.future.model_dump()
    model = from_scratch(config, **parts) if lm is None else wrap(lm, **parts)
    if recipe.training.train_only is not None:
        freeze(model, recipe.training.train_only)
    if recipe.training.lora is not None:
        adapters.add_lora(model, recipe.training.lora)
    return model


def cost(recipe: Recipe) -> dict:
    """What a run will be and cost, as `describe` says it; no data is opened (see `training.sweep.costs`)."""
    model = budget.on_meta(recipe)
    row_flops, settings = budget.flops_per_row(model, recipe.data.seq_len), recipe.training
    steps = budget.steps_for(settings, row_flops, recipe.data.seq_len, 1, budget.scaling_parameters(model))
    return describe(model, recipe, steps, settings.batch_size * settings.accumulation, row_flops)


def freeze(model, pattern: str) -> None:
    """Freeze every parameter whose name the regex does not match. Raises RecipeError if that is all of them."""
    for name, parameter in model.named_parameters():
        if re.search(pattern, name) is None:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"training.train_only: {pattern!r} matches no parameter; nothing would be trained")


def train(
    recipe: Recipe,
    folder: Path,
    resume: bool = False,
    device: str = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    data=None,
    accept: bool = False,
) -> dict:
    """Train the model of a recipe in `folder` and measure it.

    Args:
        folder: of `folder_for`.
        resume: go on from the newest complete checkpoint; a finished run is returned as it is.
        device: `auto`, `cpu`, `cuda` or `mps`.
        callbacks: more callbacks of Hugging Face's Trainer.
        data: the recipe's data where it is open already.
        accept: with `resume`, go on with texts that are not those the run began with.

    Returns:
        What `result.json` holds (`describe` and `measure` say what; `waste` is the fraction of padding in each split).

    Raises:
        ValueError: recipe, data and model do not fit each other.
        FloatingPointError: the loss, the gradient or a weight stopped being finite.
        OSError: the disk is full; the newest checkpoint is whole.
        Stopped: SIGTERM or Ctrl-C; the step in progress was ended and saved.
    """
    finished = folder / "result.json"
    if resume and finished.exists():
        return json.loads(finished.read_text(encoding="utf-8"))
    with checkpoints.full_disk_said(folder / "checkpoints"):
        return _train(recipe, folder, resume, device, callbacks, data, accept)


def _train(
    recipe: Recipe, folder: Path, resume: bool, device: str, callbacks: Sequence[TrainerCallback], data, accept: bool
) -> dict:
    where = device_of(device)
    if where.type == "cpu":
        torch.set_flush_denormal(True)  # gradients leave numbers near zero behind, which a CPU computes with slowly
    data = kept.opened(folder, recipe, resume, data, accept)
    model = build_model(recipe, data.tokenizer)
    attend(model, recipe.backbone.attn_implementation)
    settings, seq_len = recipe.training, recipe.data.seq_len
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    row_flops = budget.flops_per_row(model, seq_len)
    rows = settings.batch_size * settings.accumulation * processes
    steps = budget.steps_for(settings, row_flops, seq_len, processes, budget.scaling_parameters(model))
    read = data.train.head(steps * rows) if recipe.data.stream else data.train
    curve_rows = data.validation.head(recipe.evaluation.rows or len(data.validation))

    def curve(current) -> dict[str, float]:
        found = bits.bits_per_byte(
            current, curve_rows, data.token_bytes, current.schedule, recipe.evaluation.batch_size, settings.precision
        )
        seen = visits.look(current, collate([curve_rows[0]])) if settings.statistics else {}
        return {"bits_per_byte": found.bits_per_byte} | seen

    clock, looked = Clock(), Statistics() if settings.statistics else None
    tracking = trackers.started(settings.report_to, folder, recipe)
    metrics = Metrics(folder, rows * seq_len, rows * row_flops, clock, settings.tensorboard, looked, tracking)
    watching: list[TrainerCallback] = [clock, metrics]
    if looked is not None:
        watching.append(looked)
    if settings.recurrent_weight is not None:
        watching.append(Curriculum(model, settings.recurrent_weight))
    if settings.gates_first:
        watching.append(adapters.NewFirst(model, settings.gates_first, processes))
    if settings.optimiser == "nanochat":
        watching.append(optimisers.NanochatMuon(settings.weight_decay))
    if recipe.evaluation.points:
        watching.append(Curve(recipe.evaluation.points))
    worker = trainer.UndertowTrainer(
        model=model,
        args=trainer.arguments(
            settings, folder / "checkpoints", steps, recipe.seed, where, in_order=recipe.data.stream
        ),
        train_dataset=training_rows(recipe, read, data.tokenizer),
        data_collator=collate,
        processing_class=data.tokenizer,
        callbacks=[*watching, *callbacks],
        optimiser=partial(optimisers.build, settings=settings, batch_tokens=rows * seq_len),
        flops_per_row=row_flops,
        measure=curve,
        skip=settings.nonfinite == "skip",
        skip_logits=settings.skip_logits,
    )
    start = checkpoints.newest_complete(folder / "checkpoints") if resume else None
    if resume and start is None:
        warnings.warn(f"{folder}: no complete checkpoint; training starts from the beginning", stacklevel=2)
    try:
        with signals.held() as asked, compiled(model, settings.compile):
            worker.add_callback(Leave(asked))
            worker.train(resume_from_checkpoint=None if start is None else str(start))
    finally:
        metrics.close()
    if asked.number is not None:
        last = checkpoints.newest_complete(folder / "checkpoints")
        raise signals.Stopped(asked.number, f"step {worker.state.global_step} is saved in {last}; --resume goes on")
    trained = sum(parameter.numel() for _, parameter in optimisers.trainable(model))
    if settings.lora is not None:
        adapters.merge_lora(model)
    state = parallel()
    if state.is_main_process:
        checkpoints.begin(folder / "model")
    state.wait_for_everyone()
    worker.save_model(str(folder / checkpoints.PART / "model"))
    state.wait_for_everyone()
    if state.is_main_process:
        checkpoints.finish(folder / "model")
        del worker, model  # the trainer's autocast stays on its model: what is measured is what was saved
        loaded = load(folder, device)
        result = describe(loaded.model, recipe, steps, rows, row_flops)
        result |= {"trained_parameters": trained}
        result |= {"waste": {"train": read.waste, "validation": data.validation.waste}}
        if isinstance(data, Data) and data.reading is not None:
            result["data"] = data.reading.to_dict()
        result |= measure(loaded, data)
        result["training_tokens_per_second"] = training_speed(folder)
        if settings.nonfinite == "skip":
            logged = read_metrics(folder / "metrics.jsonl")
            result["skipped_steps"] = sum(line.get("skipped", 0) for line in logged)
        result["environment"] = environment(where)
        card.write(folder / "model", loaded.model, recipe.name, recipe, result)
        write_json(folder / "result.json", result)
    state.wait_for_everyone()
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def load(folder: Path, device: str = "auto", memory: str | None = None) -> Loaded:
    """The model of a run (or of any folder `save_pretrained` wrote) in `eval()`, and how texts are read for it.

    Args:
        memory: where the memory acts instead of where it acted in training (None or `run`: there).

    A plain Hugging Face model is wrapped without methods: it computes what it did.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: its weights are torn.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    places = [folder / "model", folder, checkpoints.newest_complete(folder / "checkpoints")]
    found = next((place for place in places if place and (place / "config.json").exists()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: holds no trained model (no model/, no complete checkpoint)")
    why = checkpoints.problem(found, "*.safetensors") if (found / checkpoints.CHECKSUMS).exists() else None
    if why is not None:
        raise ValueError(f"{found}: {why}; the weights are not what was saved")
    where = device_of(device)
    try:
        checkpoints.check_size(found)
        read: Any = AutoModelForCausalLM.from_pretrained(found, use_safetensors=True, output_loading_info=True)
        model, info = read
        tokenizer = read_tokenizer(found)
    except SafetensorError as error:
        raise ValueError(f"{found}: the weights are torn: {error}") from None
    except Exception as error:  # of damaged files transformers and tokenizers raise whatever they trip on
        raise ValueError(f"{found}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):  # else these would be drawn at random, or lost
        names = sorted(map(str, info[what]))
        if names:
            raise ValueError(f"{found}: weights and config.json do not fit: {what.replace('_', ' ')}: {names[0]}, ...")
    if not isinstance(model, UndertowForCausalLM):
        model = wrap(model)  # a plain model: recurrent in nothing
    model.eval().to(where)
    recipe = recipes.load(folder) if (folder / "recipe.yaml").exists() else None
    if recipe is not None and recipe.schedule is not None:
        model.schedule = recipe.schedule  # a run-time choice: a checkpoint does not hold it
    form = kept.with_memory(kept.format_in(found, recipe, tokenizer), memory)
    return Loaded(model, kept.format_for(model, form), recipe)


def evaluate(
    folder: Path,
    overrides: Sequence[str] = (),
    schedules: Sequence[str] = (),
    device: str = "auto",
    memory: str | None = None,
    accept: bool = False,
) -> dict:
    """Measure a trained run again; written to `evaluation.json` in its folder.

    Args:
        overrides: `evaluation.key=value` texts; other sections may not change.
        schedules: more schedules to measure under.
        memory: where the memory acts instead of where it acted in training: `all`, `response` or `none`.
        accept: measure on texts that are not those of the run.
    """
    for text in overrides:
        if not text.startswith("evaluation."):
            raise RecipeError(f"--set {text}: only evaluation.* may change when a run is evaluated")
        if text.partition("=")[0].strip() == "evaluation.points":
            raise RecipeError(f"--set {text}: does not apply to a finished run: it says how often training is measured")
    chosen = recipes.load(folder, overrides)
    loaded, data = load(folder, device), reopen(folder, chosen, accept, memory)
    result = measure(Loaded(loaded.model, data.format, chosen), data, schedules)
    finished = Path(folder) / "result.json"
    before = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {}
    result = before | result
    write_json(Path(folder) / "evaluation.json", result)
    return result


def write_json(path: Path, value) -> None:
    """A file whole or not at all: a reader never sees half of it."""
    cache.write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))
