"""What a method is: a small frozen config that builds a plan, edges, modules and a default schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from undertow.registry import from_mapping

if TYPE_CHECKING:
    from torch import nn

    from undertow.backbone.adapter import Shape
    from undertow.edges import Edge
    from undertow.plan import Plan
    from undertow.schedules import Schedule

METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Parts:
    """What a method contributes to a model.

    Attributes:
        plan: the tree of visits (depth methods only).
        edges: of either delay.
        modules: name -> mixer, projection, carry, extra block or start vector.
        blocks: names of those modules that are extra blocks.
        starts: register -> name of its start vector.
        schedule: the default in training (time methods only).
        mark: the token at which delay-1 targets are mixed, where a caller gives no `memory_mask` (None: everywhere).
        beyond: whether they are mixed at tokens after those that a caller's `memory_mask` covers, the generated ones
            (where there is a `mark`: at that token alone).
    """

    plan: Plan | None = None
    edges: tuple[Edge, ...] = ()
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    starts: Mapping[str, str] = field(default_factory=dict)
    schedule: Schedule | None = None
    mark: int | None = None
    beyond: bool = True


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass is registered under its class name; `kind` is `"depth"` or `"time"`."""

    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        METHODS[cls.__name__] = cls

    def build(self, shape: Shape, retrofit: bool) -> Parts:
        """The parts for a backbone of this shape; `retrofit`: the identity at the start.

        Raises:
            ValueError: a layer, or a length, that does not fit the shape.
        """
        raise NotImplementedError

    def looped(self, loops: int | tuple[int, ...]) -> Method:
        """This method with another loop count, for evaluation. Raises ValueError where there is no loop."""
        raise ValueError(f"loops={loops!r}: {type(self).__name__} has no loop count")

    def draw(self) -> int | None:
        """The loop count of one training forward (None: the method's own)."""
        return None

    def to_dict(self) -> dict:
        """`{"method": name, **fields}`, the form of configs and recipes."""
        return {"method": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping, kind: str) -> Method:
        """The inverse of `to_dict`. Raises ValueError for an unknown method or field."""
        return from_mapping(values, "method", {n: c for n, c in METHODS.items() if c.kind == kind}, f"{kind} method")

    def _whole(self, name: str, least: int | None = None, optional: bool = False):
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least}"
            raise ValueError(f"{type(self).__name__} {name}={value!r}: must be a whole number{bound}")


class Spanning(Protocol):
    """A method over the layers start..end."""

    @property
    def start(self) -> int:
        """The first layer."""

    @property
    def end(self) -> int:
        """The last layer."""


def span_of(method: Spanning, shape: Shape) -> tuple[int, int]:
    """`method.start..method.end` as layer numbers, both inclusive. Raises ValueError if start comes after end."""
    start, end = shape.layer(method.start, "start"), shape.layer(method.end, "end")
    if start > end:
        raise ValueError(
            f"{type(method).__name__} start={method.start}, end={method.end}: layer {start} comes after layer {end} "
            f"in a model of {shape.layers} layers; start must not be greater than end"
        )
    return start, end
