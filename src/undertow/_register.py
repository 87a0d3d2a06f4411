"""`import undertow` makes Hugging Face's Auto classes know our model, without loading torch or transformers itself.

If transformers' auto classes are loaded already, ours register at once; otherwise right after they are, whoever loads
them (where that is one of our own modules, when it is whole: the model imports it). So
`AutoModelForCausalLM.from_pretrained` works after `import undertow`, in either order, and the command line still
answers at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys

_AUTO = "transformers.models.auto.modeling_auto"


class _AfterAuto(importlib.abc.MetaPathFinder):
    """Finds transformers' auto module and ours as everyone does, and loads our model class once the former has run.

    `loading`: how many of our modules are half way through; `due`: the auto module has run.
    """

    def __init__(self):
        self.loading, self.due = 0, False

    def find_spec(self, name, path, target=None):
        ours = name.startswith("undertow.")
        if not ours and name != _AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                self.loading += ours
                try:
                    run(module)
                finally:
                    self.loading -= ours
                self.due = self.due or not ours
                if self.due and not self.loading and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    importlib.import_module("undertow.model")

            spec.loader.exec_module = exec_module
        return spec


def register():
    """Register now if transformers' auto classes are loaded, else when they are."""
    if _AUTO in sys.modules:
        importlib.import_module("undertow.model")
    elif not any(isinstance(finder, _AfterAuto) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAuto())
