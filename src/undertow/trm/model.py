"""The Tiny Recursive Model (arXiv 2510.04871): one supervision step, and a folder it is saved to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from undertow.data import cache
from undertow.recipe import translate
from undertow.trm import recursion
from undertow.trm.config import TRMConfig
from undertow.trm.network import Block, Rotary, linear, normal_, wide
from undertow.trm.puzzle_embeddings import PuzzleEmbeddings

Registers = dict[str, Tensor]  # the carried state: register -> `_BSD`
Q_BIAS = -5.0  # a model that has learned nothing goes on


class TRM(nn.Module):
    """`model(state, inputs, vectors) -> (state, logits, q)`: one supervision step.

    The state is a value: `start(rows)` makes the first one, a step returns the next one, without gradient.
    """

    def __init__(self, config: TRMConfig):
        super().__init__()
        D = config.width
        self.config, self.recursion = config, recursion.of(config)
        self.program = self.recursion.program()
        self.tokens = nn.Embedding(config.vocab_size, D)
        self.positions = nn.Embedding(config.tokens, D) if config.positions == "learned" else None
        for table in (self.tokens, self.positions):
            if table is not None:
                normal_(table.weight, D**-0.5)
        self.puzzles = PuzzleEmbeddings(config.num_identifiers, config.vector) if config.vector else None
        rotary = Rotary(config.tokens, D // config.heads) if config.positions == "rope" else None
        self.blocks = nn.ModuleDict({name: Block(config, rotary) for name in self.recursion.blocks})
        self.head = linear(D, config.vocab_size)
        self.q_head = nn.Linear(D, 2)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, Q_BIAS)
        for register in self.recursion.registers:  # drawn once, never trained, the same at every position
            self.register_buffer(f"start_{register}", normal_(torch.empty(D), 1.0))

    def start(self, rows: int) -> Registers:
        """The state before the first step, of so many puzzles."""
        shape = (rows, self.config.tokens, self.config.width)
        return {r: self.get_buffer(f"start_{r}").expand(shape) for r in self.recursion.registers}

    def embed(self, inputs_BL: Tensor, vectors_BW: Tensor | None) -> Tensor:
        """`x_BSD`: the puzzle's vector in P prefix tokens, then the cells."""
        x_BSD, D = self.tokens(inputs_BL), self.config.width
        if vectors_BW is not None:
            padded = F.pad(vectors_BW, (0, self.config.prefixed * D - vectors_BW.shape[-1]))
            x_BSD = torch.cat([padded.unflatten(-1, (-1, D)), x_BSD], 1)
        if self.positions is not None:
            x_BSD = (x_BSD + self.positions.weight) / 2**0.5  # keeps the variance
        return x_BSD * D**0.5

    def forward(
        self, state: Mapping[str, Tensor], inputs_BL: Tensor, vectors_BW: Tensor | None = None
    ) -> tuple[Registers, Tensor, Tensor]:
        """One supervision step.

        Args:
            state: of `start` or of the step before.
            inputs_BL: tokens of the puzzles.
            vectors_BW: what `puzzles` gives for them (None where the model has none).

        Returns:
            the next state, `logits_BLV` of every cell, and `q_B2` in float32 at least: what halting and going on are
            worth, as logits.
        """
        state = recursion.run(self.program, self.blocks, self.embed(inputs_BL, vectors_BW), dict(state))
        answer_BSD = state[self.recursion.answer]
        q_B2 = wide(self.q_head(answer_BSD[:, 0]))
        carried = {r: state[r].detach() for r in self.recursion.registers}
        return carried, self.head(answer_BSD[:, self.config.prefixed :]), q_B2

    def vectors(self, identifiers_B: Tensor) -> Tensor | None:
        """The puzzles' own vectors, a leaf (None where the model has none)."""
        return None if self.puzzles is None else self.puzzles(identifiers_B)

    def wants_to_halt(self, q_B2: Tensor) -> Tensor:
        """Whether the halt head says that a row is done, `_B`."""
        return q_B2[:, 0] > (q_B2[:, 1] if self.config.compares else 0)

    # ------------------------------------------------------------------ on disk

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` to a folder, made if need be."""
        folder = Path(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        cache.write(folder / "model.safetensors", lambda file: file.write(save(tensors)))
        cache.write(folder / "config.json", lambda file: file.write(self.config.model_dump_json(indent=1).encode()))

    @classmethod
    def load(cls, folder: Path) -> TRM:
        """The model in a folder, in `eval()` mode on the CPU.

        Raises:
            FileNotFoundError: no model there.
            ValueError: its config or weights are torn, or do not belong together.
        """
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder}: holds no puzzle model (no config.json)")
        try:
            config = TRMConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except ValidationError as error:
            raise ValueError(f"{folder / 'config.json'}: {translate(error, TRMConfig)}") from None
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: not JSON: {error}") from None
        model = cls(config)
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (SafetensorError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{folder / 'model.safetensors'}: not the weights of this config: {said}") from None
        return model.eval()
