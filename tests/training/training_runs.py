"""What tests of whole runs share."""

from safetensors.torch import load_file
from transformers import TrainerCallback

from undertow.training import run
from undertow.training.callbacks import read_metrics


class Kill(TrainerCallback):
    """Interrupt training after a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trained(recipe, folder, **keywords):
    return run.train(recipe, run.folder_for(recipe, folder, keywords.get("resume", False)), device="cpu", **keywords)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
