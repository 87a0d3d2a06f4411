"""YAML as recipes are written: safe, no key twice, `1e-3` a number."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from undertow.recipe_base import RecipeError, one_line


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and `1e-3` is a number (YAML 1.1 wants `1.0e-3`)."""

    def construct_mapping(self, node, deep=False):
        self.flatten_mapping(node)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Raises RecipeError (syntax, duplicate keys, not a mapping), FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise RecipeError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, a date that is none, a number of 5,000 digits
        raise RecipeError(f"{path}: not readable as YAML: {one_line(error)}") from None
    except RecursionError:
        raise RecipeError(f"{path}: not readable as YAML: nested too deeply") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must be a mapping of sections such as backbone, data and training")
    return values
