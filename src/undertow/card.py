"""The model card: a README.md beside the weights that says what a model is, how it came about and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from undertow.plan import each_layer_once, unroll

if TYPE_CHECKING:
    from undertow.recipe import Recipe

# What of `result.json` is a score, in the words of the card.
SCORES = {
    "bits_training": "bits per byte of validation text, training schedule",
    "bits_true": "bits per byte of validation text, true decoding",
    "bits_text": "bits per byte of other text, true decoding",
    "solved": "share of the task's problems solved",
}
LOAD = """\
```python
{ours}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def card(model, name: str, recipe: Recipe | None = None, result: Mapping[str, Any] | None = None) -> str:
    """The text of a model card.

    Args:
        model: an `UndertowForCausalLM`, or a plain causal LM (which loads without us).
        name: what the model is called.
        recipe: what it was trained by; None says nothing about training.
        result: of the run (`result.json`): what it cost and what was measured.
    """
    result = result or {}
    ours, config = hasattr(model, "undertow"), model.config.get_text_config()
    pretrained = None if recipe is None else recipe.backbone.pretrained
    head: dict[str, Any] = {"library_name": "undertow" if ours else "transformers", "pipeline_tag": "text-generation"}
    if pretrained is not None and not Path(pretrained).exists():  # an id on the hub, not a place on somebody's disk
        head["base_model"] = pretrained
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    lines.append(f"A causal language model of {parameters:,} parameters on {config.model_type}")
    lines[-1] += f" ({config.num_hidden_layers} layers, width {config.hidden_size}, {config.vocab_size} tokens)."
    if ours:
        lines += ["", *_recurrence(model)]
    lines += ["", "## Loading", "", LOAD.format(ours="import undertow\n\n" if ours else "")]
    if recipe is not None:
        lines += ["## Training", "", *_training(recipe, result, None if pretrained is None else Path(pretrained))]
    scores = [f"| {words} | {result[key]:.4f} |" for key, words in SCORES.items() if result.get(key) is not None]
    if scores:
        lines += ["", "## Scores", "", "| | |", "| --- | ---: |", *scores]
    return "\n".join(lines).rstrip() + "\n"


def _recurrence(model) -> list[str]:
    from undertow.analysis import label

    steps, layers = model.program.steps, model.view.shape.layers
    lines = ["## Recurrence", ""]
    if [step.block for step in steps] != [step.block for step in unroll(each_layer_once(layers), layers)]:
        lines.append(f"- plan: blocks {' '.join(str(step.block) for step in steps)}")
    else:
        lines.append("- plan: each layer once")
    lines += [f"- over {kind}: {label(m)}" for kind, m in (("depth", model.depth), ("time", model.time)) if m]
    return [*lines, f"- training schedule: {label(model.schedule)}; in evaluation the exact recurrence, `Converge()`"]


def _training(recipe: Recipe, result: Mapping[str, Any], folder: Path | None) -> list[str]:
    source = recipe.data.model_dump()["source"]
    if isinstance(source, dict):
        said = f"{source['task']} ({', '.join(f'{k}={v}' for k, v in source.items() if k != 'task')})"
    else:  # paths are somebody's: only their last part says what was read
        said = ", ".join(Path(name).name for name in ([source] if isinstance(source, str) else source))
    start = "random weights" if folder is None else f"pretrained weights ({folder.name})"
    lines = [f"- start: {start}", f"- data: {said}, rows of {recipe.data.seq_len} tokens"]
    if "steps" in result:
        lines.append(
            f"- cost: {result['steps']:,} steps, {result['tokens']:,} tokens, {result['training_flops']:.2e} FLOPs"
        )
    settings = recipe.training
    if settings.lora is not None:
        lines.append(f"- trained: adapters of rank {settings.lora.rank} (merged) and what is new")
    if settings.train_only is not None:
        lines.append(f"- trained: only parameters named `{settings.train_only}`")
    if settings.gates_first:
        lines.append(f"- the first {settings.gates_first:.0%} of the steps trained only what is new")
    return [*lines, f"- optimiser: {settings.optimiser}, learning rate {settings.learning_rate:g}, seed {recipe.seed}"]


def write(folder: Path, model, name: str, recipe: Recipe | None = None, result: Mapping | None = None) -> None:
    """Write `README.md` into a folder that holds a saved model; arguments as `card`."""
    from undertow.data import cache

    text = card(model, name, recipe, result)
    cache.write(folder / "README.md", lambda file: file.write(text.encode()))


def leave(folder: Path, model) -> None:
    """Write the card of a model that was just saved, unless the folder has one, which may say more."""
    if not (folder / "README.md").exists():
        write(folder, model, folder.resolve().name)
