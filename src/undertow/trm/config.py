"""Sizes and shape of a puzzle model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from undertow.recipe_base import Bad
from undertow.recipe_sections import Positive, Section

PREFIX = 16  # tokens of the prefix, as published
COMPARING = ("hrm", "transformer")  # of the older code: a prefix no longer than it need be, and two logits compared


class Network(Section):
    """What may be chosen about the network. Defaults are the published ones (Sudoku, attention).

    Attributes:
        variant: `trm`: latent z and answer y; `singlez`: one state; `hier6`: six latents, one for each inner step;
            `hrm`: the Hierarchical Reasoning Model, two modules, gradient through the last run of each; `transformer`:
            no recursion within a step, the blocks run once.
        mixing: `mlp` mixes positions by a SwiGLU over the sequence instead of attention (mlp_t).
        positions: `rope`, `learned` or `none`.
        expansion: 2/3 of it times the width is the inner width of an MLP, rounded up to a multiple of `round_to`.
        layers: blocks of the module R (of each of the two in `hrm`).
        inner, outer: n and T (L_cycles and H_cycles): n times z, then y, and that T times.
        puzzle_width: width of a puzzle's own vector (None: `width`; 0: puzzles have none, and there is no prefix).
        prefix: tokens that the puzzle's vector, padded with zeros, is cut into (None: 16; in `hrm` and `transformer` as
            many as the vector fills, ceil(puzzle_width / width)).
        max_steps: supervision steps a puzzle gets at most.
        continue_loss: Q-learning of whether to go on (None: in `hrm` only). A row halts where q_halt > q_continue with
            it and in `transformer`, which compares the two without ever training the second; else where q_halt > 0.
    """

    variant: Literal["trm", "singlez", "hier6", "hrm", "transformer"] = "trm"
    mixing: Literal["attention", "mlp"] = "attention"
    positions: Literal["rope", "learned", "none"] = "rope"
    width: Positive = 512
    heads: Positive = 8
    expansion: Annotated[float, Field(gt=0)] = 4.0
    round_to: Positive = 256
    layers: Positive = 2
    inner: Positive = 6
    outer: Positive = 3
    puzzle_width: Annotated[int, Field(ge=0)] | None = None
    prefix: Positive | None = None
    max_steps: Positive = 16
    continue_loss: bool | None = None

    @property
    def vector(self) -> int:
        """Width of a puzzle's own vector (0: there is none)."""
        return self.width if self.puzzle_width is None else self.puzzle_width

    @property
    def prefixed(self) -> int:
        """P, the tokens before the first cell."""
        if not self.vector:
            return 0
        if self.prefix is not None:
            return self.prefix
        return -(-self.vector // self.width) if self.variant in COMPARING else PREFIX

    @property
    def q_learning(self) -> bool:
        """Whether the model learns what going on is worth."""
        return self.variant == "hrm" if self.continue_loss is None else self.continue_loss

    @property
    def compares(self) -> bool:
        """Whether a row halts where q_halt > q_continue, and not where q_halt > 0."""
        return self.q_learning or self.variant in COMPARING

    @model_validator(mode="after")
    def _fits(self):
        if self.vector > self.prefixed * self.width:
            raise Bad("puzzle_width", f"{self.vector}: exceeds prefix * width, {self.prefixed * self.width}")
        if self.mixing == "attention" and self.heads > self.width:
            raise Bad("heads", f"{self.heads}: exceeds width, {self.width}")
        if self.mixing == "attention" and self.positions == "rope" and (self.width // self.heads) % 2:
            raise Bad(
                "heads", f"{self.heads}: gives heads of odd width {self.width // self.heads}; rope needs an even one"
            )
        if self.mixing == "mlp" and self.positions == "rope":
            raise Bad("positions", "'rope': only attention rotates; with mixing mlp allowed are learned, none")
        if self.variant == "hier6" and self.inner > 6:
            raise Bad("inner", f"{self.inner}: hier6 has six latents, so at most 6")
        if self.variant == "hrm" and self.continue_loss is False:
            raise Bad("continue_loss", "False: hrm is always trained with it")
        return self


class TRMConfig(Network):
    """A network and the puzzles it is for: what `model.safetensors` needs to be read.

    Attributes:
        vocab_size: V; token 0 is the pad.
        seq_len: L, cells of a puzzle.
        num_identifiers: puzzles with a vector of their own; 0 is nobody's.
    """

    vocab_size: Positive
    seq_len: Positive
    num_identifiers: Positive = 1

    @property
    def tokens(self) -> int:
        """S, positions the network sees."""
        return self.prefixed + self.seq_len
