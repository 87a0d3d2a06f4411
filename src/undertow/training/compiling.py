"""`torch.compile`, a layer at a time: loops, sweeps and random depths run the same compiled layers again.

What differs from call to call stays outside of the graphs. A layer is left where it hands its keys and values over
(which positions they are for is the sweep's affair) and where a mixer adds to a projection; lengths are symbols. So
nothing is compiled again because a sweep has other positions, a loop another count, or a text another length.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from undertow import store
from undertow.backbone import adapter
from undertow.model import UndertowForCausalLM
from undertow.recipe_base import one_line

LIMIT = 64  # variants of one function: with and without mask, gradient, memory ... (torch's own limit is 8)


@contextmanager
def compiled(model: UndertowForCausalLM, on: bool = True, backend: str | Callable = "inductor") -> Iterator[None]:
    """Within, the model's layers and blocks are compiled when they first run.

    Warns, once, where torch gives a function up because it was compiled too often: it then runs as it is.

    Raises:
        ValueError: they cannot be compiled, as without a C++ compiler (or Triton, on a GPU).
    """
    if not on:
        yield
        return
    names = {step.block for step in model.program.steps}
    parts = [*model.view.layers, *(module for name, module in model.undertow.items() if name in names)]
    log, said = logging.getLogger("torch._dynamo.convert_frame"), _Said()
    log.addFilter(said)
    try:
        with (
            _outside(),
            torch._dynamo.config.patch(
                allow_unspec_int_on_nn_module=True,  # else each layer's number makes a variant
                skip_nnmodule_hook_guards=False,  # a projection may be tapped after its layer ran plain
                recompile_limit=LIMIT,
            ),
            torch._functorch.config.patch(donated_buffer=False),  # the adjoint goes back through a layer several times
        ):
            for part in parts:
                part.compile(dynamic=True, backend=backend)
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        why = error.inner_exception if isinstance(error, torch._dynamo.exc.BackendCompilerFailed) else error
        raise ValueError(f"training.compile: {one_line(why)}") from error
    finally:
        log.removeFilter(said)
        for part in parts:
            part._compiled_call_impl = None  # what comes later (decoding) has other shapes


@contextmanager
def _outside() -> Iterator[None]:
    """Keep what a sweep decides out of the graphs."""
    update, mix = store.View.update, adapter.mix_taps
    store.View.update = torch.compiler.disable(update)  # type: ignore[method-assign]
    adapter.mix_taps = torch.compiler.disable(mix)
    try:
        yield
    finally:
        store.View.update, adapter.mix_taps = update, mix  # type: ignore[method-assign]


class _Said(logging.Filter):
    """Turns torch's words about functions that were compiled too often into one warning."""

    done = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("torch._dynamo hit config."):
            return True
        function = record.args[2] if isinstance(record.args, tuple) and len(record.args) > 2 else "a function"
        if not self.done:
            self.done = True
            warnings.warn(
                f"training.compile: {function} was compiled {LIMIT} times, torch's limit here; what comes anew runs "
                'uncompiled from now on (TORCH_LOGS="recompiles" says why)',
                stacklevel=2,
            )
        return False
