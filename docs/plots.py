"""The pictures of docs/explanation: `python docs/plots.py` draws them anew (float64, seconds on one core).

Every picture is a function of numbers that another function computes; tests/test_docs.py holds the numbers to what the
pages say.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "explanation"
SURFACE, INK, MUTED, GRID = "#fcfcfb", "#0b0b0b", "#52514e", "#e1e0d9"
COLOURS = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948")


def chains(tokens: int, layers: int, source: int | None = None, target: int = 0) -> np.ndarray:
    """How many layer evaluations, one after the other, lead to each layer of each token, its own included.

    Layer l of token t waits for layer l-1 of t and, through attention, of every token before. With `source`, layer
    `target` of t waits for layer `source` of t-1 as well.

    Returns:
        whole numbers, `(tokens, layers)`.
    """
    found = np.zeros((tokens, layers), int)
    for t in range(tokens):
        for layer in range(layers):
            waits = [found[: t + 1, layer - 1].max()] if layer else []
            if source is not None and layer == target and t:
                waits.append(found[t - 1, source])
            found[t, layer] = 1 + max(waits, default=0)
    return found


def wavefront(schedule, T: int = 64, pull: float = 0.9, seed: int = 0) -> np.ndarray:
    """How wrong the state of `m_t = tanh(pull m_{t-1} + x_t)` is after every pass, where a pass computes T positions.

    Returns:
        absolute errors, `(passes, T)`.
    """
    x = np.random.default_rng(seed).normal(size=T)
    true, m = np.zeros(T), 0.0
    for t in range(T):
        true[t] = m = np.tanh(pull * m + x[t])
    memory, computed, errors = np.zeros(T), 0, []
    for sweep in schedule.sweeps(T):
        positions = np.array(sweep.positions)
        before = np.where(positions > 0, memory[positions - 1], 0.0)  # read once, at the start of the sweep
        if not computed:
            before = np.zeros_like(before)
        memory[positions] = np.tanh(pull * before + x[positions])
        computed += len(positions)
        if computed % T == 0:
            errors.append(np.abs(memory - true))
    return np.array(errors)


def model(gate: float = 1.5, layers: int = 4, width: int = 32, seed: int = 0):
    """A small random model in float64; the state of layer 2 enters layer 1 through a gate of tanh(gate)."""
    import torch
    from transformers import GPT2Config

    import undertow as ut

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=width, n_layer=layers, n_head=4, vocab_size=64, n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, initializer_range=0.15, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = ut.from_scratch(config, time=ut.T2MLR(1, 2)).double().eval()
    with torch.no_grad():
        made.undertow["memory_mixer"].scale_m.fill_(gate)
    return made


def tokens(T: int, seed: int = 0):
    """Random token ids, `(1, T)`."""
    import torch

    return torch.randint(64, (1, T), generator=torch.Generator().manual_seed(seed))


def costs(T: int = 128) -> dict[str, list[tuple[float, float]]]:
    """`(passes of the span, relative distance of the memory to the true recurrence)` of every schedule, by its kind."""
    import torch

    import undertow as ut

    made, x = model(), tokens(T)
    kinds = {
        "Jacobi(K)": [ut.Jacobi(K) for K in (1, 2, 3, 4, 6, 8, 11)],
        "Interleaved(S)": [ut.Interleaved(S) for S in (2, 4, 8, 16)],
        "Cyclic(2, n)": [ut.Cyclic(2, n) for n in (1, 2, 3, 4, 6, 8, 11)],
        "Cyclic(8, n)": [ut.Cyclic(8, n) for n in range(1, 8)],
        "Cyclic(32, n)": [ut.Cyclic(32, n) for n in range(1, 5)],
    }
    with torch.no_grad():
        true = made(x, schedule=ut.Sequential()).memory
        runs = {kind: [made(x, schedule=s) for s in schedules] for kind, schedules in kinds.items()}
    return {
        kind: [(out.passes, float((out.memory - true).norm() / true.norm())) for out in outs]
        for kind, outs in runs.items()
    }


def gradients(T: int = 64, most: int = 8) -> dict[str, list[tuple[int, float]]]:
    """`(k, relative distance of the gradient to backpropagation through time)`, all parameters together."""
    import torch

    import undertow as ut

    made, x = model().train(), tokens(T)
    parameters = list(made.parameters())

    def gradient(schedule):
        found = torch.autograd.grad(made(x, labels=x, schedule=schedule).loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    true = gradient(ut.Sequential())
    kinds = {
        "Jacobi(15, backward=k)": lambda k: ut.Jacobi(15, backward=k),
        "Cyclic(8, 4, adjoint=k)": lambda k: ut.Cyclic(8, 4, adjoint=k),
        "Cyclic(8, 4, adjoint=k, solve='cyclic')": lambda k: ut.Cyclic(8, 4, adjoint=k, solve="cyclic"),
    }
    found = {
        kind: [(k, float((gradient(make(k)) - true).norm() / true.norm())) for k in range(most + 1)]
        for kind, make in kinds.items()
    }
    flat = float((gradient(ut.Interleaved(2)) - true).norm() / true.norm())
    return found | {"Interleaved(2)": [(0, flat), (most, flat)]}


def _figure(width: float, height: float, columns: int = 1):
    """A figure and its axes, plain, the same bytes every time it is saved."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "undertow", "font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": MUTED}
    plt.rcParams |= {"xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK, "svg.fonttype": "path"}
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    figure.set_facecolor(SURFACE)
    for axis in axes[0]:
        axis.set_facecolor(SURFACE)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def draw_chains(name: str):
    figure, axes = _figure(7.4, 2.6, 2)
    kinds = {"no state over time": chains(6, 4), "layer 3 of a token feeds layer 2 of the next": chains(6, 4, 2, 1)}
    for axis, (title, steps) in zip(axes, kinds.items(), strict=True):
        axis.set_title(title, fontsize=9)
        for t, layer in np.ndindex(steps.shape):
            if layer:
                _arrow(axis, (t, layer - 1), (t, layer), GRID)
        if title.startswith("layer"):
            for t in range(1, 6):
                _arrow(axis, (t - 1, 2), (t, 1), COLOURS[0])
        for t, layer in np.ndindex(steps.shape):
            axis.text(
                t,
                layer,
                steps[t, layer],
                ha="center",
                va="center",
                bbox={"boxstyle": "circle", "fc": SURFACE, "ec": MUTED},
            )
        axis.set(xlim=(-0.5, 5.5), ylim=(-0.5, 3.5), xlabel="token", xticks=range(6), yticks=range(4))
        axis.set_yticklabels([f"layer {i + 1}" for i in range(4)])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    _save(figure, name)


def _arrow(axis, begin, end, colour):
    axis.annotate(
        "", end, begin, arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 9, "shrinkB": 9, "lw": 1.3}
    )


def draw_wavefront(name: str):
    import undertow as ut

    figure, axes = _figure(7.4, 2.5, 2)
    for axis, schedule in zip(axes, (ut.Jacobi(7), ut.Cyclic(8, 7)), strict=True):
        errors = np.log10(np.maximum(wavefront(schedule), 1e-16))
        shown = axis.imshow(errors, aspect="auto", vmin=-16, vmax=0, cmap="Blues", interpolation="nearest")
        axis.set(title=f"{type(schedule).__name__}", xlabel="position", ylabel="pass", yticks=range(8))
        axis.set_yticklabels(range(1, 9))
    bar = figure.colorbar(shown, ax=axes, ticks=[-16, -12, -8, -4, 0])
    bar.ax.set_yticklabels(["exact", "1e-12", "1e-8", "1e-4", "1"])
    bar.set_label("error of the state")
    _save(figure, name)


def _lines(name: str, found: dict, x: str, y: str):
    figure, (axis,) = _figure(6.2, 3.4)
    for colour, (kind, points) in zip(COLOURS, found.items(), strict=False):
        first = kind.startswith("Jacobi")  # drawn wide: another line may lie on it
        axis.semilogy(
            *zip(*points, strict=True), "o-", color=colour, label=kind, ms=7 if first else 4, lw=4 if first else 1.6
        )
    axis.set(xlabel=x, ylabel=y)
    axis.grid(color=GRID, linewidth=0.8)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, name)


def _save(figure, name: str):
    path = FOLDER / name
    figure.savefig(path, metadata={"Date": None})
    kept = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    draw_chains("chains.svg")
    draw_wavefront("wavefront.svg")
    _lines("costs.svg", costs(), "passes of the span", "distance of the memory")
    _lines("gradients.svg", gradients(), "k", "distance of the gradient")
