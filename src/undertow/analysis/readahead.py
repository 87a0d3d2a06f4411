"""How much of later tokens the lower layers know: the model cut to its first layers, read by its own head.

T2MLR's skip-layer read-out (arXiv 2607.15178): all of x_{t+1} .. x_{t+5} are looked up in the one distribution that the
head gives at position t.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from undertow.data import collate
from undertow.edges import compile_program
from undertow.model import UndertowForCausalLM
from undertow.plan import NORM, Block, Visit
from undertow.schedules import Schedule
from undertow.training.precision import autocast


@dataclass(frozen=True)
class Readahead:
    """What the logits at position t say of x_{t+k}; entry k-1 of every tuple belongs to k.

    Attributes:
        skip, layers: layers left out at the top, layers run.
        log_probability: mean of ln p(x_{t+k}), in nats.
        accuracy: how often x_{t+k} is the likeliest token.
        probability: mean of p(x_{t+k}).
        tokens: pairs (t, t+k) counted.
    """

    skip: int
    layers: int
    log_probability: tuple[float, ...]
    accuracy: tuple[float, ...]
    probability: tuple[float, ...]
    tokens: tuple[int, ...]

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def cut(model: UndertowForCausalLM, skip: int) -> UndertowForCausalLM:
    """The same model without its last `skip` backbone layers, on the same tensors; the model given is left as it is.

    Visits of those layers leave the plan. An edge into one is dropped; an edge from one starts at the new last layer.
    Extra blocks, the final norm and the head stay.

    Raises:
        ValueError: `skip` leaves no layer, or the plan makes no sense without those layers.
    """
    program, layers = model.program, model.view.shape.layers
    if not 0 <= skip < layers:
        raise ValueError(f"skip={skip}: the model has {layers} layers; allowed are 0..{layers - 1}")
    kept = layers - skip

    def stays(block: Block) -> bool:
        return isinstance(block, str) or block < kept

    plan = tuple(
        Visit(step.block, step.reads, step.writes[0], step.slot, read_only=step.shares)
        for step in program.steps
        if stays(step.block)
    )
    edges = dict.fromkeys(edge for step in program.steps for entering in step.edges.values() for edge in entering)
    shallow = copy.copy(model)
    shallow.program = compile_program(
        plan,
        tuple(e if stays(e.source) else replace(e, source=kept - 1) for e in edges if stays(e.target)),
        kept,
        blocks=tuple({step.block for step in program.steps if isinstance(step.block, str) and step.block != NORM}),
        starts=dict(program.starts),
    )
    return shallow


@torch.no_grad()
def readahead(
    model: UndertowForCausalLM,
    rows: Sequence[Mapping],
    skip: int = 0,
    ahead: int = 5,
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> Readahead:
    """Look up the next `ahead` tokens in each position's logits, with the last `skip` layers left out.

    Args:
        model: in `eval()`, on any device.
        rows: as `undertow.data.collate` takes them. A pair counts where both tokens are real and of one document
            (`attention_mask`, `position_ids`), and the later one is a target (`labels`, where there are any).
        schedule: None takes true decoding.
        batch_size, precision: as in `bits_per_byte`.

    Raises:
        ValueError: as `cut`; `ahead` is below 1; or the rows hold no pair of tokens that far apart.
    """
    if ahead < 1:
        raise ValueError(f"ahead={ahead}: must be at least 1")
    shallow, device = cut(model, skip), model.device
    nats, hits, mass = ([0.0] * ahead for _ in range(3))
    count = [0] * ahead
    for start in range(0, len(rows), batch_size):
        batch = collate([dict(rows[i]) for i in range(start, min(start + batch_size, len(rows)))])
        labels_BT = batch.pop("labels", None)
        document_BT, real_BT = _documents(batch)
        with autocast(precision, device):
            logits_BTV = shallow(
                **{key: value.to(device) for key, value in batch.items()}, schedule=schedule, use_cache=False
            ).logits
        for b, logits_TV in enumerate(logits_BTV):  # a row at a time: float32 logits are the largest tensor here
            said_TV = logits_TV.float().log_softmax(-1)
            best_T = said_TV.argmax(-1).cpu()
            for k in range(1, min(ahead + 1, len(best_T))):
                counted = (document_BT[b, k:] == document_BT[b, :-k]) & real_BT[b, k:] & real_BT[b, :-k]
                if labels_BT is not None:
                    counted &= labels_BT[b, k:] != -100
                target = batch["input_ids"][b, k:]
                said = said_TV[:-k].gather(-1, target.to(device)[:, None])[:, 0].cpu().double()[counted]
                nats[k - 1] += said.sum().item()
                mass[k - 1] += said.exp().sum().item()
                hits[k - 1] += int((best_T[:-k] == target)[counted].sum())
                count[k - 1] += len(said)
    if not all(count):
        raise ValueError(f"ahead={ahead}: the rows hold no two tokens of one document {count.index(0) + 1} apart")

    def means(totals: list[float]) -> tuple[float, ...]:
        return tuple(total / n for total, n in zip(totals, count, strict=True))

    layers = model.view.shape.layers - skip
    return Readahead(skip, layers, means(nats), means(hits), means(mass), tuple(count))


def _documents(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`(document_BT, real_BT)`: numbers that differ between documents of a row, and False at pads."""
    ids_BT = batch["input_ids"]
    mask_BT, position_BT = batch.get("attention_mask"), batch.get("position_ids")
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    document_BT = torch.zeros_like(ids_BT) if position_BT is None else (position_BT == 0).cumsum(1)
    return document_BT, real_BT


def table(depths: Sequence[Readahead]):
    """Three lines a depth: mean log-probability (nats), top-1 accuracy and mean probability of x_{t+1} .. x_{t+k}."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), title="read-ahead", title_justify="left")
    made.add_column("layers", justify="right")
    made.add_column("")
    for k in range(1, len(depths[0].tokens) + 1):
        made.add_column(f"t+{k}", justify="right")
    for found in depths:
        made.add_row(str(found.layers), "log p", *(f"{x:.3f}" for x in found.log_probability))
        made.add_row("", "top-1", *(f"{x:.1%}" for x in found.accuracy))
        made.add_row("", "mean p", *(f"{x:.4f}" for x in found.probability))
    return made
