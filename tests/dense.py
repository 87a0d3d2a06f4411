"""Our Llama and its position encodings as formulas, dense, with none of the modules they are tests of."""

import torch

from undertow.backbone.positions import alibi_slopes


def causal(S: int, K: int) -> torch.Tensor:
    """Queries are the last S of K rows."""
    return torch.arange(K)[None] <= torch.arange(K - S, K)[:, None]


def softmax(s: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    weights = torch.where(allowed, (s - s.detach().amax(-1, keepdim=True)).exp(), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def cope(q, s, allowed, table):
    """One score at a time: gates over the keys from j to the query, and the line between two columns of q P."""
    size, added = table.shape[1], torch.zeros_like(s)
    gates = torch.where(allowed, 1 / (1 + (-s).exp()), 0.0)
    for j in range(s.shape[-1]):
        p = gates[..., j:].sum(-1).clamp(max=size - 1)
        low, high = p.floor().long(), p.ceil().long()
        z = q @ table
        below, above = (z.gather(-1, i[..., None])[..., 0] for i in (low, high))
        column = torch.zeros(s.shape[-1], dtype=s.dtype)
        column[j] = 1
        added = added + (above * (p - low) + below * (1 - (p - low)))[..., None] * column
    return added


def fire_bias(module, position_ids, rows, keys):
    c, limit = module.c, (module.a * module.threshold).abs()
    i, d = position_ids.double(), (rows[..., None] - torch.arange(keys)).double()
    x = torch.log(1 + (c * d).abs()) / (torch.log(1 + (c * torch.maximum(i, limit)).abs()) + 1e-6)[..., None]
    hidden = (x[..., None] * module.in_weight + module.in_bias).relu()
    return torch.einsum("btkm,hm->bthk", hidden, module.out_weight) + module.out_bias[:, None]


def dense(lm, x, counts=(1, 1, 1, 1), position_ids=None, allowed=None):
    """Logits by formula, every layer l `counts[l]` times; no module of Hugging Face's is called."""
    c, T, base = lm.config, x.shape[1], lm.model
    H, E = c.num_attention_heads, c.head_dim
    rows = torch.arange(T)[None]
    position_ids = rows if position_ids is None else position_ids
    allowed = causal(T, T) if allowed is None else allowed
    distance = (rows[..., None] - torch.arange(T)).double()[:, None]

    def norm(module, h):
        if hasattr(module, "gamma"):
            deviation = ((h - h.mean(-1, keepdim=True)) ** 2).sum(-1, keepdim=True).div(h.shape[-1] - 1).sqrt()
            unit = (h - h.mean(-1, keepdim=True)) / (deviation + 1e-6)
            return (h @ module.gamma.weight.T + module.gamma.bias) * unit + h @ module.beta.weight.T + module.beta.bias
        return module.weight * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotated(z):
        angle = position_ids[:, None, :, None].double() / 10000.0 ** (torch.arange(0, E, 2) / E)
        a, b = z.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attention(module, a):
        q, k, v = (
            (a @ p.weight.T).unflatten(-1, (-1, E)).transpose(1, 2)
            for p in (module.q_proj, module.k_proj, module.v_proj)
        )
        k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)
        if c.position == "rope":
            q, k = rotated(q), rotated(k)
        if c.head_scale:
            q = q * module.head_scale.clamp(min=1)[:, None, None] / E**0.5
            s = q @ k.mT
        else:
            s = q @ k.mT / E**0.5
        if c.position == "alibi":
            s = s - torch.tensor(alibi_slopes(H), dtype=s.dtype)[:, None, None] * distance
        elif c.position == "fire":
            s = s + fire_bias(module.position, position_ids, rows, T).transpose(1, 2)
        elif c.position == "cope":
            s = s + cope(q, s, allowed, module.position.table_EP)
        return (softmax(s, allowed) @ v).transpose(1, 2).flatten(2) @ module.o_proj.weight.T

    h = base.embed_tokens.weight[x]
    if c.position == "learned":
        h = h + base.embed_positions.weight[position_ids]
    for layer, count in zip(base.layers, counts, strict=True):
        for j in range(count):
            read, weight = h, 1.0
            if layer.loop is not None:
                read, weight = h + layer.loop.input.weight[j], layer.loop.weight.weight[j]
            h = h + attention(layer.self_attn, norm(layer.input_layernorm, read))
            m, mlp = norm(layer.post_attention_layernorm, h), layer.mlp
            gate = m @ mlp.gate_proj.weight.T
            h = h + weight * ((gate * torch.sigmoid(gate) * (m @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T)
    return norm(base.norm, h) @ lm.lm_head.weight.T
