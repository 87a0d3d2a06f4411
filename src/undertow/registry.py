"""Frozen configs by name: the `{"method": name, **fields}` or `{"kind": name, **fields}` of recipes and configs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args


def from_mapping(values: Mapping, key: str, classes: Mapping[str, type], what: str):
    """Build the class that `values[key]` names from the other values.

    Raises:
        ValueError: an unknown name or field, or whatever the class raises; one line that says what is allowed.
    """
    arguments = dict(values)
    name = arguments.pop(key, None)
    if name not in classes:
        raise ValueError(f"{what} {name!r}: allowed are {sorted(classes)}")
    known = [f.name for f in fields(classes[name])]
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"{name} has no field {argument!r}; allowed are {known}")
    return classes[name](**arguments)


def check_options(make: Callable, options: Mapping[str, Any], what: str):
    """Hold options against the keyword-only arguments of `make`: name, type, and whether any is missing.

    Raises:
        ValueError: one line that begins with `what` and says what is allowed.
    """
    parameters = inspect.signature(make, eval_str=True).parameters
    known = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{what} {name}={value!r}: allowed are {sorted(known) or 'no options'}")
        kinds = get_args(known[name].annotation) or (known[name].annotation,)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            raise ValueError(f"{what} {name}={value!r}: must be {' or '.join(kind.__name__ for kind in kinds)}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{what} {name} is missing: it has no default")
