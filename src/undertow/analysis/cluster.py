"""What a training run costs on GPUs that are not here: formulas, counts and stated constants, nothing measured.

FLOPs come from `analysis.flops`; what no formula knows, bytes kept for the backward and operators launched, is counted
on small twins of the model (`analysis.counts`) and scaled by layers. Everything a page says follows from these and from
the constants below.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from undertow.analysis import counts, flops, label
from undertow.model import UndertowForCausalLM, from_scratch
from undertow.schedules import Schedule

__all__ = ["H100", "Cluster", "Counted", "Plan", "count", "held", "plan"]


@dataclass(frozen=True)
class Cluster:
    """Constants of a machine, a GPU's each: FLOP/s in bfloat16, bytes of memory, bytes a second sent and received.

    Attributes:
        link: between the GPUs of a node; `network`: between nodes.
        eager, graph: seconds a launch takes, one operator after another from Python, and replayed from a CUDA graph.
        mfu: share of the peak that large matrix products reach in a step.
    """

    gpus: int
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    eager: float
    graph: float
    mfu: float

    @property
    def ridge(self) -> float:
        """Rows that a product of bfloat16 matrices needs before it waits for the weights no longer."""
        return self.flops / self.bandwidth


# NVIDIA H100 SXM5 datasheet: 989 TFLOP/s dense bfloat16, 80 GB HBM3, 3.35 TB/s, NVLink 900 GB/s both ways together; DGX
# H100: one 400 Gb/s InfiniBand port a GPU. The last three are assumptions: no GPU was at hand.
H100 = Cluster(8, 989e12, 80e9, 3.35e12, 450e9, 50e9, eager=5e-6, graph=1e-6, mfu=0.4)


@dataclass(frozen=True)
class Counted:
    """What was counted of one schedule, linear in the layers: `a + b L`.

    Attributes:
        saved: bytes a token kept for the backward, in bfloat16 autocast.
        forward, backward: operators launched.
    """

    saved: tuple[float, float]
    forward: tuple[float, float]
    backward: tuple[float, float]

    def at(self, layers: int) -> tuple[float, float, float]:
        """Bytes kept, launches forward and launches backward, of a model of so many layers."""
        saved, forward, backward = (a + b * layers for a, b in (self.saved, self.forward, self.backward))
        return saved, forward, backward


def count(config, time, schedule: Schedule, T: int, layers: tuple[int, int], short: int = 32) -> Counted:
    """Count one schedule on twins of two depths, without a GPU and without the memory of the real one.

    Bytes are those of a model of the true width on one row of T tokens, run on tensors without data; an adjoint keeps
    one sweep's (a test holds that), as values are needed to decide whether it solved anything. Launches are those of a
    narrow model on `short` tokens, which launches the same operators.
    """
    found = [_twin(config, time, schedule, T, depth, short) for depth in layers]
    (first, second), step = found, layers[1] - layers[0]
    slopes = [(b - a) / step for a, b in zip(first, second, strict=True)]
    lines = [(a - slope * layers[0], slope) for a, slope in zip(first, slopes, strict=True)]
    return Counted(*lines)


def _twin(config, time, schedule: Schedule, T: int, layers: int, short: int) -> tuple[float, float, float]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from undertow.schedules import Jacobi

    sizes = {"num_hidden_layers": layers, "layer_types": None}
    with FakeTensorMode():
        model = from_scratch(_copy(config, **sizes), time=time).train()
        x = torch.zeros(1, T, dtype=torch.long)
        kept = schedule if schedule.adjoint is None else Jacobi(0)
        with torch.autocast("cpu", torch.bfloat16):
            saved = counts.saved_bytes(lambda: model(x, labels=x, schedule=kept), model) / T
    torch.manual_seed(0)
    narrow = dict(hidden_size=32, head_dim=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32)
    narrow |= dict(vocab_size=64, sliding_window=short // 2)
    model = from_scratch(_copy(config, **sizes, **narrow), time=time).train()
    x, losses = torch.randint(0, 64, (1, short)), []
    forward = counts.launches(lambda: losses.append(model(x, labels=x, schedule=schedule).loss)).total()
    return saved, forward, counts.launches(losses[0].backward).total()


def _copy(config, **changes):
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
    return type(config)(**(values | changes))


# ---------------------------------------------------------------------- memory and traffic


@dataclass(frozen=True)
class Held:
    """Bytes that do not depend on the batch: float32 weights, gradients and optimiser state, bfloat16 casts of the
    matrices; `layers`: bfloat16 bytes of all layers' own weights, `parameters`: their number in the whole model."""

    weights: float
    gradients: float
    optimiser: float
    casts: float
    layers: float
    parameters: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.casts


def held(model: UndertowForCausalLM) -> Held:
    """Under `optimiser: nanochat`: a momentum for every matrix in Muon's groups, two for all else (AdamW)."""
    from undertow.training.optimisers import hidden_matrices, trainable

    matrices = hidden_matrices(model)
    sizes = {name: p.numel() for name, p in trainable(model)}
    every, muon = sum(sizes.values()), sum(sizes[name] for name in matrices)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    cast = sum(p.numel() for _, p in trainable(model) if p.ndim == 2 and id(p) not in tables)
    layers = sum(p.numel() for layer in model.view.layers for p in layer.parameters())
    return Held(4.0 * every, 4.0 * every, 4.0 * muon + 8.0 * (every - muon), 2.0 * cast, 2.0 * layers, every)


def stages(model: UndertowForCausalLM, schedule: Schedule, T: int) -> tuple[int, int, int]:
    """Sweeps one after the other: `(forward, backward, positions of the smallest)`."""
    if not model.program.memories:
        return 1, 1, T
    sweeps = [s for s in schedule.sweeps(T) if not s.settle]
    least = min(len(s.positions) for s in sweeps)
    if schedule.adjoint is None:
        return len(sweeps), sum(s.grad for s in sweeps), least
    return len(sweeps) + 1, 1 + schedule.adjoint, least


def ring(gpus: int, numbers: float) -> float:
    """Bytes that every GPU sends in one all-gather or reduce-scatter of so many bytes; an all-reduce is two."""
    return numbers * (gpus - 1) / gpus


# ---------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Plan:
    """One schedule on one cluster. Times in seconds of one optimiser step, bytes a GPU's, launches a micro-batch's.

    Attributes:
        flops: of training, a token's. `relative`: over those of the plain backbone.
        stages: forward and backward; `rows`: of the smallest sweep, all rows of the micro-batch together.
        activations: bytes of the micro-batch; `used`: of everything, under DDP.
        batch: rows of a micro-batch; `micro`: how many make a step.
        compute: at the stated MFU; `eager`, `graph`: what the launches take at least.
        ddp: bytes sent, the gradients once a step. `fsdp`: with weights gathered once a micro-batch and kept;
            `resharded`: gathered anew for every sweep.
        tokens: a second, over all GPUs, eager under DDP with nothing overlapped.
    """

    schedule: str
    flops: float
    relative: float
    stages: tuple[int, int]
    rows: int
    launches: tuple[float, float]
    activations: float
    used: float
    batch: int
    micro: int
    compute: float
    eager: float
    graph: float
    ddp: float
    fsdp: float
    resharded: float
    tokens: float


def plan(
    model: UndertowForCausalLM,
    base: float,
    schedule: Schedule,
    counted: Counted,
    cluster: Cluster,
    T: int,
    step: int,
    room: float = 0.9,
) -> Plan:
    """What `schedule` costs.

    Args:
        model: on the meta device; `base`: training FLOPs a token of its plain backbone.
        step: tokens of one optimiser step, over all GPUs.
        room: share of the memory to fill; rows are a power of two.
    """
    saved, forward, backward = counted.at(model.view.shape.layers)
    kept, each = held(model), step // T // cluster.gpus  # rows a GPU has to do
    batch = each
    while batch > 1 and kept.total + batch * T * saved > room * cluster.memory:
        batch //= 2
    micro = ceil(each / batch)
    cost = flops.training_flops(model, T, schedule) / T
    compute = cost * step / cluster.gpus / (cluster.flops * cluster.mfu)
    launched = micro * (forward + backward)
    n_forward, n_backward, least = stages(model, schedule, T)
    n = cluster.gpus
    every = 2.0 * kept.parameters
    scatter = ring(n, 4.0 * kept.parameters)
    gathered = micro * ring(n, every) + scatter
    ddp = 2 * ring(n, 4.0 * kept.parameters)
    again = micro * ring(n, every + kept.layers * (n_forward + n_backward - 1)) + scatter
    took = max(compute, launched * cluster.eager) + ddp / cluster.link
    return Plan(
        label(schedule), cost, cost / base, (n_forward, n_backward), batch * least, (forward, backward),
        batch * T * saved, kept.total + batch * T * saved, batch, micro, compute, launched * cluster.eager,
        launched * cluster.graph, ddp, gathered, again, step / took,
    )  # fmt: skip
