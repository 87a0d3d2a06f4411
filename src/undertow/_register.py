"""`import undertow` makes Hugging Face's Auto classes know our model, without loading torch or transformers itself.

If transformers' auto classes are loaded already, ours register at once; otherwise right after they are, whoever loads
them. So `AutoModelForCausalLM.from_pretrained` works after `import undertow`, in either order, and the command line
still answers at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys

_AUTO = "transformers.models.auto.modeling_auto"


class _AfterAuto(importlib.abc.MetaPathFinder):
    """Finds transformers' auto module as everyone does, and loads our model class once it has run."""

    def find_spec(self, name, path, target=None):
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                importlib.import_module("undertow.model")

            spec.loader.exec_module = exec_module
        return spec


def register():
    """Register now if transformers' auto classes are loaded, else when they are."""
    if _AUTO in sys.modules:
        importlib.import_module("undertow.model")
    elif not any(isinstance(finder, _AfterAuto) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAuto())
