"""`import undertow` registers our models with Hugging Face, whoever imports what first."""

import subprocess
import sys
from pathlib import Path

import pytest

import undertow

SOURCE = Path(undertow.__file__).parent
LOADS = """
import tempfile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import undertow as ut
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
model = ut.wrap(LlamaForCausalLM(LlamaConfig(**sizes)), time=ut.T2MLR(0, 1))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
assert type(again) is ut.UndertowForCausalLM and type(again.config) is ut.UndertowConfig
"""
ORDERS = {
    "ours, then a config, then the models": """
import undertow as ut
from transformers import LlamaConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM
""",
    "theirs first": "from transformers import AutoModelForCausalLM, Trainer",
    "the auto module itself": "import transformers.models.auto.modeling_auto",
    "a part of ours": "from undertow.methods import T2MLR",
    "the executor": "import undertow.execute",
    "the server": "import undertow.serve.engine",
    "peft": "import peft",
}
SLOW = tuple(name for name in ORDERS if name not in ("ours, then a config, then the models", "theirs first"))


def runs(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "order", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ORDERS]
)
def test_a_saved_model_loads_in_any_order_of_imports(order):
    runs(ORDERS[order] + LOADS)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_can_be_imported_first(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    runs(f"import {'.'.join(part for part in parts if part != '__init__')}")


def test_what_is_public_is_there():
    assert all(hasattr(undertow, name) for name in undertow.__all__)
