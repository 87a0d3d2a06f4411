"""What a forward returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from undertow.cache import UndertowCache
from undertow.versions import NEW, OLD

__all__ = ["UndertowOutput"]


@dataclass
class UndertowOutput(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: the weighted mean over the schedule's read-outs of their means over their own targets (nats a token), if
            labels were given; `undertow.loss` has the formula.
        logits: `_BTV`, each position from the last sweep that read it out (with labels and more than one such sweep:
            without gradient, which the loss has).
        cache: the `UndertowCache`, keys and values of every slot and the memory; also as `past_key_values`.
        hidden_states: with `output_hidden_states`, `_BTD` each: the embeddings, then what every visit of a layer or
            block wrote (more entries than layers where some run again), the last one after the final norm.
        sweep_losses: one loss a read-out, unweighted.
        memory: what each token left behind, `_BTD` (`_BTND` with N > 1 sources), None without a delay-1 edge.
        residual: of `Converge`, the relative change of the memory in the last round.
        passes: cost of the sweeps, in passes of the span over all positions.
        future_losses: one loss a future-token head, if the model has them and labels were given.
        rounds: `_BT`, the rounds every token took under an exit rule.
        last_hidden_state: `_BTD`, what the LM head read, unless labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: UndertowCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    sweep_losses: Tensor | None = None
    memory: Tensor | None = None
    residual: float | None = None
    passes: float | None = None
    future_losses: Tensor | None = None
    rounds: Tensor | None = None
    last_hidden_state: Tensor | None = None

    @property
    def past_key_values(self) -> UndertowCache | None:
        """The cache, by its older name; that name is understood wherever one is given."""
        return self.cache

    def __setattr__(self, name, value):
        super().__setattr__(_new(name), value)

    def __contains__(self, key):
        return super().__contains__(_new(key))

    def __getitem__(self, key):
        return super().__getitem__(_new(key))

    def __setitem__(self, key, value):
        super().__setitem__(_new(key), value)

    def get(self, key, default=None):
        """As of any mapping."""
        return super().get(_new(key), default)


def _new(name):
    return NEW if name == OLD else name
