"""Frozen configs by name: the `{"method": name, **fields}` or `{"kind": name, **fields}` of recipes and configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields


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
