"""Where undertow differs from the published code, or did: one entry a cause. `gone=True`: everything agrees.

While an entry stands, tests hold that its outputs differ and that all others agree, so neither a fix nor a new fault
goes unseen. A new cause is a new entry; a fix sets `gone`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from golden.cases import Case


@dataclass(frozen=True)
class Difference:
    """One cause.

    Args:
        name: what differs, in a few words.
        published, ours: what either does.
        cases: regular expression of the cases it shows in.
        outputs: and of the outputs.
        kinds: `wide` (float64), `released` (float32) or both.
        gone: whether it is no more.
    """

    name: str
    published: str
    ours: str
    cases: str
    outputs: str = ".*"
    kinds: tuple[str, ...] = ("wide", "released")
    gone: bool = False

    def shows(self, case: Case) -> bool:
        """Whether it shows, or showed, in a case."""
        return re.fullmatch(self.cases, case.name) is not None

    def stands(self, case: Case, kind: str) -> bool:
        """Whether it shows in these outputs of a case today."""
        return not self.gone and kind in self.kinds and self.shows(case)


DIFFERENCES = (
    Difference(
        "pre-norm",
        "RMS pre-norm with an eps of 2^-23, LayerNorm pre-norm with 1e-5",
        "1e-6 for both",
        r"t2mlr/(llama_gated_pre_post_norm|gpt2_gated_pre_layernorm)",
        "(?!.*_ids).*",
        ("wide",),
        gone=True,
    ),
    Difference(
        "post-norm",
        "mixers `constant_weight`, `concat`, `baseline_coconut` and `baseline_codi` take it and do not apply it",
        "applied",
        r"t2mlr/gpt2_constant_post_norm",
        gone=True,
    ),
    Difference(
        "memory norm",
        "the norm of LRT's memory has the eps of the backbone's norms, 2^-23",
        "1e-6",
        r"lrt/(memory_.|checkpoint_interleaved)",
        "(?!logits_zero_memory).*",
        ("wide",),
        gone=True,
    ),
    Difference(
        "mean of sweeps",
        "the loss of a sweep is a mean over its own targets",
        "scaled by T over its number of positions, divided by all targets",
        r"lrt/(memory_.|checkpoint_interleaved)",
        "(loss|losses|grad)_interleaved.*",
        gone=True,
    ),
    Difference(
        "rotary tables",
        "in bfloat16, whatever the precision of the model",
        "exact",
        r"lrt/.*",
        kinds=("released",),
        gone=True,
    ),
    Difference(
        "start vectors",
        "where rounds without gradient have written a register, its start vector has none",
        "a straight-through gradient",
        r"gpttrm/option_[ab]",
        "grad_causal/undertow.trm_start.*",
        gone=True,
    ),
    Difference(
        "AdamATan2",
        "the package 0.0.3: the first moment's correction multiplies the step, outside the arctangent",
        "inside, as 0.0.2",
        r"trm/(adam_atan2|three_training_steps)",
        "parameters|loss|after/.*|ema/.*",
        gone=True,
    ),
)
# Checkpoint folders that `undertow import` refuses, and what it says.
REFUSED = {
    "t2mlr/checkpoint_alpha_coupled": "recurrent_mixing_module_name='alpha_coupled': only 'gated' can be imported",
    "t2mlr/checkpoint_s5_tinyllama": "backbone model_type 'tinyllama' is not supported",
    "lrt/checkpoint_baseline": "use_interleaved and use_multi_refine are off: a plain model, without LRT's memory",
    "ilr/checkpoint_looped_llama": "config of an LRT checkpoint: n_embd is missing",
    "trm/checkpoint_compiled": "holds no config.json",
}


def standing(case: Case, kind: str) -> tuple[Difference, ...]:
    """The differences that a case shows."""
    return tuple(d for d in DIFFERENCES if d.stands(case, kind))
