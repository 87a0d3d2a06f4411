"""Tiny random models of every family, in float64, with weights large enough that every part matters."""

import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

import undertow as ut
from undertow.backbone import UndertowLlamaConfig

V, LAYERS = 43, 4
_SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    vocab_size=V,
    max_position_embeddings=96,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_GROUPED = dict(_SIZES, num_key_value_heads=2)

CONFIGS = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "undertow_llama": lambda: UndertowLlamaConfig(**_GROUPED, position="cope"),
    "nanochat": lambda: NanoChatConfig(**_GROUPED),
    "undertow_nanochat": lambda: ut.UndertowNanoChatConfig(
        **_GROUPED, value="every", value_gate_channels=12, sliding_window=5, final_logit_softcapping=4.0
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=V, n_positions=96, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, hidden_dropout=0.0, attention_dropout=0.0),
}  # fmt: skip

# Hugging Face's RMSNorm and rotary embedding work in float32 inside; LayerNorm with learned positions and ours do not.
TOLERANCE = dict.fromkeys(CONFIGS, 1e-5) | {"gpt2": 1e-9, "undertow_nanochat": 1e-9}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter away from its start, so that nothing is zero or the identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_((0.15 if "backbone" in name or p.dim() > 1 else 0.4) * noise.to(p.dtype))
    return model


def build(family: str = "llama", depth=None, time=None, seed: int = 0, **config) -> ut.UndertowForCausalLM:
    """A model with random weights, float64, in evaluation mode."""
    torch.manual_seed(seed)
    hf = CONFIGS[family]()
    for key, value in config.items():
        setattr(hf, key, value)
    return randomise(ut.from_scratch(hf, depth=depth, time=time).double(), seed).eval()


def ids(B: int = 2, T: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-12))


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every parameter (zeros where the loss does not reach)."""
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = dict(zip(learned, torch.autograd.grad(loss, list(learned.values()), allow_unused=True), strict=True))
    return {n: torch.zeros_like(p) if found.get(n) is None else found[n] for n, p in model.named_parameters()}


def gradient_gap(a: dict, b: dict) -> float:
    """Norm of the difference of two gradients over the norm of the second, all parameters together."""
    difference = torch.stack([(a[n] - b[n]).norm() for n in b]).norm()
    return float(difference / torch.stack([g.norm() for g in b.values()]).norm())
