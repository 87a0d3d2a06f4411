"""What early exits cost and save: bits per byte, rounds and layer evaluations under each rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from undertow.data import collate
from undertow.exits import Exit
from undertow.plan import NORM
from undertow.training.precision import autocast


@dataclass(frozen=True)
class Exits:
    """What one rule did on the rows.

    Attributes:
        rule: as text, `kl:0.0005`.
        bits_per_byte: nats / (ln 2 * bytes) of the tokens that have bytes, every token predicted under the rule.
        rounds: of the loop, the mean over real tokens.
        saved: share of the layer evaluations of all rounds that a token, decoded alone, did not need. Negative where a
            rule that reads out after every round costs more than it saves.
    """

    rule: str
    bits_per_byte: float
    rounds: float
    saved: float

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def exits(
    model, rows: Sequence[dict], token_bytes, rules: Sequence[Exit], batch_size: int = 16, precision: str = "float32"
) -> tuple[Exits, ...]:
    """Measure exit rules on rows, token by token (T sequential steps a batch: take few rows).

    Args:
        model: an `UndertowForCausalLM` in `eval()` with one loop over depth.
        rows: as `undertow.data.collate` takes them; labels of -100 are not counted.
        token_bytes: bytes of every token of the vocabulary.
        rules: one result each, in this order.
        batch_size: rows at a time; `precision`: `auto`, `float32` or `bfloat16`.

    Raises:
        ValueError: no rows, no byte to predict, or a model in which nothing loops.
    """
    if len(rows) == 0:
        raise ValueError("exits: there are no validation rows")
    sizes = torch.as_tensor(token_bytes, device=model.device)
    return tuple(_measure(model, rows, sizes, rule, batch_size, precision) for rule in rules)


def _measure(model, rows: Sequence[dict], sizes, rule: Exit, batch_size: int, precision: str) -> Exits:
    nats, size, tokens, rounds, evaluations = 0.0, 0, 0, 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        labels_BT, mask_BT = batch.pop("labels"), batch.get("attention_mask")
        with autocast(precision, model.device):
            out = model(**batch, exit_rule=rule, use_cache=False)
        targets_BT = labels_BT[:, 1:]
        text_BT = sizes[targets_BT.clamp(min=0)] > 0  # special tokens are no text
        targets_BT = targets_BT.masked_fill(~text_BT, -100)
        counted = targets_BT != -100
        scores = out.logits[:, :-1].float().flatten(0, 1)
        nats += functional.cross_entropy(scores, targets_BT.flatten(), reduction="sum", ignore_index=-100).item()
        size += int(sizes[targets_BT[counted]].sum())
        real_BT = torch.ones_like(labels_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        tokens += int(real_BT.sum())
        rounds += float(out.rounds[real_BT].sum())
        evaluations += float(rule.evaluations(model.program, out.rounds)[real_BT].sum())
    if size == 0:
        raise ValueError("exits: the validation rows hold no byte to predict")
    whole = tokens * sum(step.block != NORM for step in model.program.steps)
    return Exits(str(rule), nats / (math.log(2) * size), rounds / tokens, 1 - evaluations / whole)


def table(found: Sequence[Exits]):
    """A line for every rule."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for title in ("exit rule", "bits/byte", "rounds", "evaluations saved"):
        made.add_column(title, justify="left" if title == "exit rule" else "right")
    for one in found:
        made.add_row(one.rule, f"{one.bits_per_byte:.4f}", f"{one.rounds:.2f}", f"{one.saved:.1%}")
    return made
