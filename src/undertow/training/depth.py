"""Depth sets everything: sizes, tokens, batch, learning rate and weight decay of a model from its number of layers.

Two published rules (neither is tuned below 12 layers): `NANOCHAT` and, from an older nanochat, `LRT_RELEASE`
(arXiv 2605.26797).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from undertow.training.optimisers import BATCH_TOKENS, MATRIX_LR

HEAD, PER_LAYER = 128, 64  # width of a head; width per layer
REFERENCE = 12  # the depth at which the rules are anchored, with a batch of 2^19 tokens


@dataclass(frozen=True)
class Sizes:
    """What a depth L comes to.

    Attributes:
        layers, width, heads: of the model; heads are 128 wide.
        tokens: to train on. batch_tokens: of one optimiser step. steps: of training.
        learning_rate: what multiplies every learning rate, (batch_tokens / 2^19)^1/2.
        weight_decay: of the hidden matrices.
    """

    layers: int
    width: int
    heads: int
    tokens: int
    batch_tokens: int
    steps: int
    learning_rate: float
    weight_decay: float

    def recipe(self, seq_len: int, batch_size: int, processes: int = 1) -> dict[str, dict]:
        """Values for the sections `backbone` and `training` of a recipe (optimiser `nanochat`, which scales its rates).

        Raises:
            ValueError: the batch is not a whole number of micro-batches.
        """
        return {
            "backbone": {
                "hidden_size": self.width,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads,
            },
            "training": {
                "optimiser": "nanochat",
                "learning_rate": MATRIX_LR,
                "weight_decay": self.weight_decay,
                "max_steps": self.steps,
                "batch_size": batch_size,
                "accumulation": accumulation(self.batch_tokens, seq_len, batch_size, processes),
            },
        }


@dataclass(frozen=True)
class DepthRule:
    """From the depth L and the scaling parameters N (matrices of the layers and the head).

        width         64 L, rounded up to heads of 128
        tokens        D = ratio N
        batch         2^round(log2(2^19 (D / D_12)^0.383)), or 2^19 with `fixed`
        weight decay  weight_decay (batch / 2^19)^1/2 D_12 / D, or weight_decay (12 / L)^2 with `fixed`

    D_12 is what the rule gives at 12 layers. nanochat measures the ratio that is best for compute as about 10.5.
    """

    ratio: float = 12.0
    weight_decay: float = 0.28
    fixed: bool = False

    def __call__(self, layers: int, vocab_size: int = 32768, scaling: int | None = None) -> Sizes:
        """Sizes at a depth.

        Args:
            vocab_size: of the head.
            scaling: N; None counts it (`scaling_parameters`). Memory maps are best left out of it: LRT's release counts
                them and so gives itself 15 % more tokens than its baseline.

        Raises:
            ValueError: layers is not a whole number of at least 1.
        """
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ValueError(f"layers={layers!r}: must be a whole number of at least 1")
        tokens = self.ratio * (scaling_parameters(layers, vocab_size) if scaling is None else scaling)
        growth = tokens / (self.ratio * scaling_parameters(REFERENCE, vocab_size))
        batch = BATCH_TOKENS if self.fixed else 2 ** round(log2(BATCH_TOKENS * growth**0.383))
        scale = (batch / BATCH_TOKENS) ** 0.5
        decay = (REFERENCE / layers) ** 2 if self.fixed else scale / growth
        width = width_of(layers)
        return Sizes(
            layers=layers,
            width=width,
            heads=width // HEAD,
            tokens=round(tokens),
            batch_tokens=batch,
            steps=max(1, round(tokens / batch)),
            learning_rate=scale,
            weight_decay=self.weight_decay * decay,
        )


NANOCHAT = DepthRule()
LRT_RELEASE = DepthRule(weight_decay=0.2, fixed=True)


def width_of(layers: int) -> int:
    """64 a layer, rounded up to whole heads."""
    return -(-PER_LAYER * layers // HEAD) * HEAD


def scaling_parameters(layers: int, vocab_size: int) -> int:
    """Matrices of the layers (12 D^2 each) and of the head (V D)."""
    width = width_of(layers)
    return 12 * width**2 * layers + vocab_size * width


def accumulation(batch_tokens: int, seq_len: int, batch_size: int, processes: int = 1) -> int:
    """Micro-batches of one optimiser step, all together exactly `batch_tokens`.

    Raises:
        ValueError: they do not divide it.
    """
    micro = seq_len * batch_size * processes
    if batch_tokens % micro:
        raise ValueError(
            f"batch_tokens={batch_tokens}: must be a multiple of {micro} "
            f"(seq_len {seq_len} x batch_size {batch_size} x processes {processes})"
        )
    return batch_tokens // micro
