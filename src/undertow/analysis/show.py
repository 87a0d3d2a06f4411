"""A model as a picture in the terminal: its plan, edges and memories, its parameters, and what it costs.

Nothing is computed and no weight is allocated: a recipe is built on the meta device, so a large one shows as fast as a
small one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from undertow.analysis import flops, label
from undertow.analysis.flops import ROUNDS
from undertow.analysis.memory import kept_bytes
from undertow.edges import Edge
from undertow.model import UndertowForCausalLM, from_scratch
from undertow.plan import EMBED, NORM, Block, Plan, Step, Visit, each_layer_once
from undertow.recipe import Recipe
from undertow.recipe import load as load_recipe
from undertow.schedules import Converge, Cyclic, Jacobi, Schedule, Sequential

__all__ = ["costs", "parameters", "picture", "plain", "render"]

LONGEST = 1024  # positions that costs are stated for, where a recipe does not say how many it trains on
STYLES = {"span": "bold cyan"}


def render(target: UndertowForCausalLM | Recipe | str | Path, T: int | None = None, memory: bool = False) -> Group:
    """What a model is, for `rich.console.Console.print`.

    Args:
        target: a model on any device; or a recipe, or its file.
        T: positions that costs are stated for (None: the recipe's `data.seq_len`; of a model, all it has, up to 1024).
        memory: also what a row of T tokens keeps for its backward (`analysis.memory`; seconds for many sweeps).

    Raises:
        ValueError: a recipe that cannot be loaded, T below 1.
        FileNotFoundError: no such file.
    """
    name, model, T = model_of(target, T)
    return Group(
        Text(name, "bold"),
        Text(_summary(model)),
        Text(),
        picture_table(picture(model)),
        *(Text(line) for line in _memories(model)),
        Text(),
        _parameter_table(model),
        Text(),
        _cost_table(model, T, memory),
        *(Text(line) for line in decoding(model, T)),
    )


def plain(target: UndertowForCausalLM | Recipe | str | Path, T: int | None = None, width: int = 120) -> str:
    """As `render`, as text of at most `width` columns. Raises as that does."""
    console = Console(width=width, color_system=None, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(render(target, T))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def model_of(target, T: int | None) -> tuple[str, UndertowForCausalLM, int]:
    """`(name, model, positions that costs are stated for)` of what `render` takes. Raises as that does."""
    if isinstance(target, UndertowForCausalLM):
        config = target.config.get_text_config()
        return config.model_type, target, min(LONGEST, config.max_position_embeddings) if T is None else T
    from undertow.training.budget import on_meta

    recipe = target if isinstance(target, Recipe) else load_recipe(target)
    return recipe.name, on_meta(recipe), recipe.data.seq_len if T is None else T


def _summary(model: UndertowForCausalLM) -> str:
    shape, config = model.view.shape, model.config.get_text_config()
    heads = f"{shape.heads} heads" + (f" ({shape.kv_heads} key/value)" if shape.kv_heads != shape.heads else "")
    said = [f"{config.model_type}: {shape.layers} layers", f"width {shape.width}", f"{heads} x {shape.head_width}"]
    said += [f"vocabulary {config.vocab_size}", f"{short(parameters(model)[-1][1])} parameters"]
    evaluations = flops.layer_evaluations(model)
    both = "" if model.program.causal else "; reads a marked prefix (prefix_mask) in both directions"
    return ", ".join(said) + f"; {evaluations:g} block evaluations per token when decoding{both}"


# ---------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Row:
    """One line of the picture: a visit of the plan (with all rounds it runs in), or the border of a loop.

    Attributes:
        part: `head`, `span`, `tail` (or two of them), empty without a memory.
        numbers: of the unrolled steps it stands for.
        drawn: brackets of the loops around it, and the block.
        stream: registers read and written, where they are not `h`.
        slots: where keys and values are kept.
        edges: what enters and leaves, one text each.
        loop: how often the loop runs that opens here or that is this one visit.
        steps: the steps themselves; none where a loop opens or closes.
    """

    part: str
    numbers: str
    drawn: str
    stream: str = ""
    slots: str = ""
    edges: tuple[str, ...] = ()
    loop: str = ""
    steps: tuple[Step, ...] = ()


def picture(model: UndertowForCausalLM) -> list[Row]:
    """The plan from the embedding to the LM head, a row for each visit in order, loops bracketed."""
    plan = _plan(model)
    if model.program.normed and all(not isinstance(v, Visit) or v.block != NORM for v in plan):
        plan = (*plan, Visit(NORM))  # an edge reads it
    last = [] if model.program.normed else ["final norm"]
    return [Row("", "", "embedding"), *drawn(model, plan), Row("", "", ", ".join([*last, "LM head"]))]


def drawn(model, plan: Plan) -> list[Row]:
    """The rows of a plan: of `model.program`, which it unrolls to."""
    steps: dict[tuple[int, ...], list[Step]] = {}
    for path, step in zip(_paths(plan), model.program.steps, strict=True):
        steps.setdefault(path, []).append(step)
    return _draw(model, plan, steps, (), "")


def _plan(model: UndertowForCausalLM) -> Plan:
    """The tree that the model's program was unrolled from."""
    depth, _ = model.config.methods()
    with torch.device("meta"):
        plan = depth and depth.build(model.view.shape, model.config.retrofit).plan
    return plan or each_layer_once(model.view.shape.layers)


def _paths(plan: Plan, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where in the tree each unrolled step comes from."""
    for i, node in enumerate(plan):
        if isinstance(node, Visit):
            yield (*path, i)
            continue
        for _ in range(node.times):
            yield from _paths(node.body, (*path, i))


def _draw(model, nodes: Plan, steps: dict[tuple[int, ...], list[Step]], path: tuple[int, ...], bars: str) -> list[Row]:
    rows: list[Row] = []
    for i, node in enumerate(nodes):
        here = (*path, i)
        if isinstance(node, Visit):
            rows.append(_visit(model, steps[here], bars))
            continue
        all_live = node.grad_last is None or node.grad_last >= node.times
        if node.times == 0 or (node.times == 1 and all_live):
            rows += _draw(model, node.body, steps, here, bars) if node.times else []
            continue
        times = f"{node.times} times" if node.times > 1 else "once"
        times += "" if all_live else f", gradient in the last {node.grad_last}" if node.grad_last else ", no gradient"
        if len(node.body) == 1 and isinstance(node.body[0], Visit):
            (only,) = _draw(model, node.body, steps, here, bars)
            rows.append(replace(only, drawn=f"{only.drawn} ↻ {times}", loop=times))
            continue
        inside = _draw(model, node.body, steps, here, f"{bars}│ ")
        rows += [Row(inside[0].part, "", f"{bars}╭ {times}", loop=times), *inside, Row(inside[-1].part, "", f"{bars}╰")]
    return rows


def _visit(model, steps: list[Step], bars: str) -> Row:
    program, first = model.program, steps[0]
    parts = {"head": program.head, "span": program.span, "tail": program.tail}
    found = [n for n, part in parts.items() if any(step in part for step in steps)] if program.memories else []
    written = list(dict.fromkeys(r for step in steps for r in step.writes if not r.startswith("@")))
    plainly = first.reads == ("h",) and written == ["h"]
    stream = "" if plainly else f"{' + '.join(first.reads)} → {', '.join(written)}"
    edges = [*_entering(model, steps)]
    for n, (source, _, _) in enumerate(program.memories):
        if any(step.index == max(s.index for s in program.steps if s.block == source) for step in steps):
            edges.append(f"→ memory {n}")
    numbers = _several([str(step.index) for step in steps])
    drawn = bars + block_name(first.block)
    return Row("-".join(found), numbers, drawn, stream, _slots(steps), tuple(edges), steps=tuple(steps))


def _slots(steps: list[Step]) -> str:
    if steps[0].block == NORM:
        return ""
    if all(step.slot == f"visit{step.index}" for step in steps):
        return "own" if len(steps) == 1 else f"{len(steps)} own"
    named = list(dict.fromkeys(f"reads {step.slot}" if step.shares else step.slot for step in steps))
    return _several(named)


def _entering(model, steps: list[Step]) -> Iterator[str]:
    """The edges that enter these visits: ports, source, delay, projections, mixer, and which visits if not all."""
    at: dict[Edge, list[int]] = {}
    for number, step in enumerate(steps, 1):
        for edge in (edge for edges in step.edges.values() for edge in edges):
            at.setdefault(edge, []).append(number)
    alike: dict[tuple, list[Edge]] = {}  # edges that differ in port and projection only
    for edge, numbers in at.items():
        alike.setdefault((edge.memory, edge.delay, edge.mixer, tuple(numbers)), []).append(edge)
    for (memory, delay, mixer, numbers), edges in alike.items():
        state = f"memory {model.program.memories.index(memory)} (t-1)" if delay else f"out({block_name(memory[0])})"
        projects = list(dict.fromkeys(edge.project for edge in edges if edge.project))
        through = f" through {', '.join(projects)}" if projects else ""
        only = "" if len(numbers) == len(steps) else f", visit {_several([str(n) for n in numbers])} of {len(steps)}"
        kind = type(model.undertow[mixer]).__name__
        yield f"{', '.join(edge.port for edge in edges)} ← {state}{through}, {kind} {mixer}{only}"


def block_name(block: Block) -> str:
    """`layer 3`, `final norm`, `embedding`, or the name of an extra block."""
    return f"layer {block}" if isinstance(block, int) else {NORM: "final norm", EMBED: "embedding"}.get(block, block)


def _several(texts: Sequence[str], at_most: int = 4) -> str:
    return ", ".join(texts) if len(texts) <= at_most else f"{texts[0]}, {texts[1]} .. {texts[-1]} ({len(texts)})"


def _memories(model: UndertowForCausalLM) -> list[str]:
    said = []
    for n, (source, norm, carry) in enumerate(model.program.memories):
        state = f"RMS norm of out({block_name(source)})" if norm else f"out({block_name(source)})"
        carried = f", updated by {type(model.undertow[carry]).__name__} {carry}" if carry else ""
        said.append(f"memory {n}: {state}{carried}; zero before the first token of a document")
    if said:
        program = model.program
        parts = (program.head, program.span, program.tail)
        head, span, tail = (sum(step.block != NORM for step in part) for part in parts)
        said.append(f"a sweep repeats the span: {span} of {head + span + tail} blocks (head {head}, tail {tail})")
    return said


def picture_table(rows: Sequence[Row]) -> Table:
    """The rows of a picture, without the columns that say nothing."""
    cells = [(r.part, r.numbers, r.drawn, r.stream, r.slots, "\n".join(r.edges)) for r in rows]
    used = [n for n in range(6) if any(line[n] for line in cells)]
    made = table_of(*(("part", "visit", "plan", "stream", "slots", "edges")[n] for n in used))
    for row, line in zip(rows, cells, strict=True):
        made.add_row(*(Text(line[n]) for n in used), style=STYLES.get(row.part, ""))
    return made


# ---------------------------------------------------------------------- sizes and costs


def parameters(model: UndertowForCausalLM) -> list[tuple[str, int, str]]:
    """`(part, parameters, remark)`, the total last. A tensor that serves two parts counts where it comes first."""
    view, seen = model.view, dict[int, int]()

    def count(modules: Sequence[torch.nn.Module]) -> int:
        new = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in seen}
        seen.update(new)
        return sum(new.values())

    embedding = count([model.get_input_embeddings()])
    layers = count(list(view.layers))
    norm = count([view.final_norm])
    head = count([model.get_output_embeddings()])
    rest = count([model.backbone])  # a table of learned positions
    found = [
        ("embedding", embedding + rest, ""),
        (f"{len(view.layers)} layers", layers, ""),
        ("final norm", norm, ""),
        ("LM head", head, "" if head else "tied to the embedding"),
    ]
    groups: dict[str, list[torch.nn.Module]] = {}
    for name, module in model.undertow.items():
        groups.setdefault(re.sub(r"_\d+$", "", name), []).append(module)
    for name, modules in groups.items():
        kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in modules))
        found.append((name, count(modules), kinds + (f", {len(modules)} of them" if len(modules) > 1 else "")))
    return [*found, ("all", sum(n for _, n, _ in found), "")]


def _parameter_table(model: UndertowForCausalLM) -> Table:
    made = table_of("parameters", "", "")
    made.columns[1].justify = "right"
    *parts, total = parameters(model)
    for name, n, remark in parts:
        made.add_row(name, f"{n:,}", remark)
    made.add_row(total[0], f"{total[1]:,}", "", style="bold")
    return made


@dataclass(frozen=True)
class Cost:
    """What one schedule costs per token: block evaluations, FLOPs forward and in training, and relative to plain.

    `relative`: training FLOPs over those of the backbone alone. `kept`: bytes that a training row keeps for its
    backward (None: not asked for).
    """

    name: str
    evaluations: float
    forward: float
    training: float
    relative: float
    kept: int | None = None


def costs(model: UndertowForCausalLM, T: int, memory: bool = False) -> list[Cost]:
    """The training schedule first, then true decoding in parallel, Jacobi and token by token; one without a memory.

    With `memory`, what each keeps for a backward too: a forward without values, seconds where there are many sweeps.
    """
    own, said = model.schedule, ""
    if isinstance(own, Converge):
        own, said = Cyclic(own.G, ROUNDS, adjoint=own.adjoint), f" in {ROUNDS} rounds"
    exactly = Converge()
    chosen: list[tuple[str, Schedule]] = [
        (f"training: {label(model.schedule)}{said}", own),
        (f"true decoding: {label(exactly)} in {ROUNDS} rounds", Cyclic(exactly.G, ROUNDS)),
        *((label(schedule), schedule) for schedule in (Jacobi(ROUNDS), Sequential())),
    ]
    chosen = chosen if model.program.memories else [("one sweep", Jacobi(0))]
    with torch.device("meta"):
        alone = from_scratch(model.config.get_text_config())
    base = flops.training_flops(alone, T, Jacobi(0))
    found = []
    for name, schedule in chosen:
        training = flops.training_flops(model, T, schedule)
        forward = flops.forward_flops(model, T, schedule)
        evaluations = flops.layer_evaluations(model, T, schedule)
        kept = kept_bytes(model, T, schedule) if memory else None
        found.append(Cost(name, evaluations, forward / T, training / T, training / base, kept))
    return found


def _cost_table(model: UndertowForCausalLM, T: int, memory: bool) -> Table:
    kept = ["kept a row"] if memory else []
    made = table_of(f"per token, T = {T}", "blocks", "FLOPs forward", "FLOPs training", "x backbone", *kept)
    for column in made.columns[1:]:
        column.justify = "right"
    for cost in costs(model, T, memory):
        cells = [f"{cost.evaluations:.4g}", short(cost.forward), short(cost.training), f"{cost.relative:.2f}"]
        made.add_row(cost.name, *cells, *([] if cost.kept is None else [f"{short(cost.kept)}B"]))
    return made


def decoding(model: UndertowForCausalLM, T: int) -> list[str]:
    """What a new token costs after T of them, and what the cache holds: two lines."""
    memory, dtype = flops.kv_bytes(model, 0), str(model.dtype).removeprefix("torch.")
    step = f"decoding: {short(flops.decode_flops(model, T))} FLOPs per token after {T} tokens"
    cache = f"cache: {short(flops.kv_bytes(model, 1) - memory)}B of keys and values per token in {dtype}"
    cache += f", {len(model.program.slots)} slots"
    return [step, cache + (f"; a memory of {short(memory)}B per sequence" if memory else "")]


def short(number: float) -> str:
    """4,210,000 as `4.21M`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def table_of(*titles: str) -> Table:
    made = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in titles:
        made.add_column(title)
    return made
