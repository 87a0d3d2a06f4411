"""A model reads one text: its gates at each token, the lens, and how far its schedule is from true decoding.

What a report draws over the text (`lens.json` of a run) and what `undertow show RUN --lens TEXT` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from undertow.analysis import label, lens
from undertow.execute import Executor
from undertow.inputs import memory_mask_for, sequence
from undertow.model import UndertowForCausalLM
from undertow.schedules import Converge
from undertow.store import write
from undertow.training.statistics import gates_of

__all__ = ["Pass", "Reading", "Said", "of_text", "passage", "read", "table"]

TINY = 1e-8  # keeps a distance from an all-zero memory finite


@dataclass(frozen=True)
class Said:
    """What one visit says: log-probability of the token that follows (None at the end), and the likeliest token."""

    name: str
    logp: tuple[float | None, ...]
    best: tuple[str, ...]


@dataclass(frozen=True)
class Pass:
    """The schedule cut off here: mean nats a token, and the mean distance of its memory from the true one."""

    name: str
    nats: float
    distance: float | None


@dataclass(frozen=True)
class Reading:
    """One text of T tokens, every sequence T long.

    Attributes:
        tokens: the text in pieces.
        schedule: the training schedule, whose sweeps `passes` follow.
        visits: under true decoding.
        memory: what the memory adds to the log-probability of the token that follows (nats; None: no memory).
        distance: `|M_t - M*_t| / |M*_t|`, the memory of the training schedule from the true one (None: no memory).
        gates: `MODULE gate NAME` -> the gate's mean over channels; `MODULE change` -> `|y - x| / |x|` of the mixer.
    """

    tokens: tuple[str, ...]
    schedule: str
    visits: tuple[Said, ...]
    passes: tuple[Pass, ...]
    memory: tuple[float | None, ...] | None
    distance: tuple[float, ...] | None
    gates: dict[str, tuple[float, ...]]

    def to_dict(self) -> dict:
        """Plain values, as `lens.json` holds them."""
        return asdict(self)


class _Mixing(Executor):
    """An executor that also keeps what every mixer did at every position, its last run."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen: dict[str, Tensor] = {}
        self.positions = range(0)

    def _visit(self, step, state, frame, seq, written) -> Tensor:
        self.positions = frame.positions
        return super()._visit(step, state, frame, seq, written)

    def recorder(self, name: str):
        """A forward hook for the mixer of that name."""

        def record(mixer: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            x = arguments[0]
            found = {f"{name} gate {gate}": value.mean(-1) for gate, value in gates_of(mixer, *arguments).items()}
            found[f"{name} change"] = (y - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=TINY)
            for key, value_BS in found.items():
                # A gate may be one number for all tokens.
                value_BS = value_BS.expand(x.shape[:2]) if value_BS.shape != x.shape[:2] else value_BS
                self.seen[key] = write(self.seen.get(key), value_BS, self.positions, 1)

        return record


@torch.no_grad()
def gates(model: UndertowForCausalLM, input_ids: Tensor) -> dict[str, Tensor]:
    """`_BT` of every gate (its mean over channels) and every mixer's relative change, under true decoding."""
    program = model.program
    watching = _Mixing(program, model.view, model.undertow)
    names = dict.fromkeys(edge.mixer for step in program.steps for edges in step.edges.values() for edge in edges)
    hooks = [model.undertow[name].register_forward_hook(watching.recorder(name)) for name in names]
    marked = memory_mask_for(model.time_parts, input_ids, input_ids)
    try:
        watching.run(sequence(model.view, program, input_ids, memory_mask=marked)[0], Converge())
    finally:
        for hook in hooks:
            hook.remove()
    return watching.seen


@torch.no_grad()
def read(model: UndertowForCausalLM, tokenizer, input_ids: Tensor) -> Reading:
    """Let a model in `eval()` read one text, `input_ids` `_T`.

    Raises:
        ValueError: fewer than 2 tokens, or more than the model has positions.
    """
    limit = model.config.get_text_config().max_position_embeddings
    if not 2 <= len(input_ids) <= limit:
        raise ValueError(f"lens: the text has {len(input_ids)} tokens: must be 2 to {limit}")
    x_BT = input_ids[None].to(model.device).long()
    after_BT, effect = lens.following(x_BT), lens.memory_effect(model, x_BT)
    views = [
        lens.view_of(lens.visit_name(model, step), logits, after_BT)
        for step, logits in lens.visits(model, x_BT, schedule=Converge())
    ]
    true = model(x_BT, schedule=Converge(), use_cache=False).memory if model.program.memories else None
    passes, far = [], None
    for name, logits, memory in lens.sweeps(model, x_BT, schedule=model.schedule):
        far = None if true is None or memory is None else _distance(memory, true)
        nats = -torch.log_softmax(logits[0, :-1].float(), -1).gather(-1, x_BT[0, 1:, None]).mean()
        passes.append(Pass(name, float(nats), None if far is None else float(far.mean())))

    def texts(ids: Tensor) -> tuple[str, ...]:
        return tuple(tokenizer.decode([int(token)]) for token in ids)

    return Reading(
        texts(input_ids),
        label(model.schedule),
        tuple(Said(view.name, _numbers(view.logp_BT[0]), texts(view.best_BT[0])) for view in views),
        tuple(passes),
        None if effect is None else _numbers(effect[0]),
        None if far is None else tuple(far[0].tolist()),
        {name: tuple(value_BT[0].tolist()) for name, value_BT in gates(model, x_BT).items()},
    )


def passage(row: Mapping[str, np.ndarray], most: int) -> Tensor:
    """The first tokens, at most so many, of the longest document in a row of `undertow.data`, `_T`."""
    ids = np.asarray(row["input_ids"])
    real = np.asarray(row.get("attention_mask", np.ones_like(ids))).astype(bool)
    ids = ids[real]
    places = np.asarray(row.get("position_ids", np.arange(len(real))))[real]
    starts = [*np.flatnonzero(places == 0), len(ids)]
    begin = max(zip(starts, starts[1:], strict=False), key=lambda ends: ends[1] - ends[0], default=(0, len(ids)))
    return torch.as_tensor(ids[begin[0] : begin[1]][:most])


def _distance(memory: Tensor, true: Tensor) -> Tensor:
    memory, true = memory.flatten(2).float(), true.flatten(2).float()
    return (memory - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=TINY)


def _numbers(values: Tensor) -> tuple[float | None, ...]:
    return tuple(None if value != value else value for value in values.tolist())


def of_text(folder: Path, text: str, overrides: Sequence[str] = (), device: str = "auto") -> Group:
    """What the model of a run (or of a saved model's folder) says on a text, for `rich.console.Console.print`.

    Args:
        overrides: `schedule.KEY=VALUE` texts; nothing else may change.

    Raises:
        ValueError: no folder with a recurrent model, or a text that is too short or too long.
    """
    from undertow import recipe as recipes
    from undertow.training import run as runs

    if not Path(folder).is_dir():
        raise ValueError(f"--lens: {folder}: needs the folder of a run or of a saved model")
    for given in overrides:
        if not given.startswith("schedule"):
            raise ValueError(f"--set {given}: only schedule may change for a trained model")
    loaded = runs.load(folder, device)
    if not isinstance(loaded.model, UndertowForCausalLM):
        raise ValueError(f"{folder}: holds a {type(loaded.model).__name__}; make it recurrent with undertow.wrap first")
    if overrides:
        loaded.model.schedule = recipes.load(folder, overrides).schedule or loaded.model.schedule
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return table(read(loaded.model, loaded.tokenizer, torch.as_tensor(ids)))


def some(items: Sequence, most: int) -> list:
    """At most `most` of them, evenly spaced, the last one always."""
    if len(items) <= most:
        return list(items)
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def table(reading: Reading, most: int = 6) -> Group:
    """The lens for a terminal: a token a row; what each of at most `most` visits would say next, right ones green."""
    made = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    chosen = some(reading.visits, most)
    for title in ("token", *(said.name.replace(", ", "\n") for said in chosen)):
        made.add_column(title, no_wrap=True, max_width=16)
    for title in ("nats", *(["memory\nadds"] if reading.memory is not None else [])):
        made.add_column(title, justify="right")
    for t, token in enumerate(reading.tokens):
        after = reading.tokens[t + 1] if t + 1 < len(reading.tokens) else None
        cells = [Text(plain(token), "bold")]
        cells += [Text(plain(said.best[t]), "green" if said.best[t] == after else "") for said in chosen]
        logp = reading.visits[-1].logp[t]
        cells.append(Text("" if logp is None else f"{-logp:.2f}"))
        if reading.memory is not None:
            adds = reading.memory[t]
            cells.append(Text("") if adds is None else Text(f"{adds:+.2f}", "green" if adds > 0 else "red"))
        made.add_row(*cells)
    over = [f"{p.name}: {p.nats:.4f} nats" + ("" if p.distance is None else f", memory off by {p.distance:.1e}")
            for p in reading.passes]  # fmt: skip
    return Group(made, Text(), Text(f"{reading.schedule}, sweep by sweep", "bold"), *(Text(line) for line in over))


def plain(token: str) -> str:
    """A token that can stand in a table: white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
