"""The published computation, written out: plain loops and formulas over a model's weights, nothing of the package."""

import math

import torch


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def swiglu(layer, x):
    gate, up = (x @ layer.gate_up.weight.T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up) @ layer.down.weight.T


def rotation(positions, width):
    angles = torch.arange(positions)[:, None].double() / 10_000 ** (torch.arange(0, width, 2).double() / width)
    return torch.cat([angles, angles], -1)


def rotate(x, angles):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos().float().double() + turned * angles.sin().float().double()


def attention(layer, x, rope):
    B, S, _ = x.shape
    q, k, v = (x @ layer.qkv.weight.T).chunk(3, -1)
    q, k, v = (y.view(B, S, layer.heads, -1).transpose(1, 2) for y in (q, k, v))
    if rope:
        angles = rotation(S, q.shape[-1])
        q, k = rotate(q, angles), rotate(k, angles)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(B, S, -1) @ layer.out.weight.T


def block(config, layer, h):
    if config.mixing == "mlp":
        h = norm(h.mT + swiglu(layer.mix, h.mT)).mT
    else:
        h = norm(h + attention(layer.mix, h, config.positions == "rope"))
    return norm(h + swiglu(layer.mlp, h))


def embed(model, inputs, vectors):
    config, D = model.config, model.config.width
    x = model.tokens.weight[inputs]
    if vectors is not None:
        prefix = torch.zeros(len(x), config.prefixed * D, dtype=x.dtype)
        prefix = torch.cat([vectors, prefix[:, vectors.shape[1] :]], -1)
        x = torch.cat([prefix.view(len(x), config.prefixed, D), x], 1)
    if config.positions == "learned":
        x = (x + model.positions.weight) / math.sqrt(2)
    return math.sqrt(D) * x


def step(model, state, inputs, vectors):
    """One supervision step of any variant: `(state, logits, q)`; `state` maps registers to tensors."""
    config, n, T = model.config, model.config.inner, model.config.outer

    def module(name):
        def R(h):
            for i in range(config.layers):
                h = block(config, model.blocks[f"{name}_{i}"], h)
            return h

        return R

    R, x, state = module("block"), embed(model, inputs, vectors), dict(state)

    if config.variant == "trm":
        y, z = state["y"], state["z"]
        with torch.no_grad():
            for _ in range(T - 1):
                for _ in range(n):
                    z = R(z + y + x)
                y = R(y + z)
        for _ in range(n):
            z = R(z + y + x)
        y = R(y + z)
        answer, new = y, {"y": y, "z": z}
    elif config.variant == "singlez":
        z = state["z"]
        with torch.no_grad():
            for _ in range(T - 1):
                for _ in range(n):
                    z = R(z + x)
                z = R(z)
        for _ in range(n):
            z = R(z + x)
        z = R(z)
        answer, new = z, {"z": z}
    elif config.variant == "hier6":
        y, zs = state["y"], [state[f"z{i}"] for i in range(6)]

        def cycle(y, zs):
            for i in range(n):
                zs = [*zs[:i], R(sum(zs) + y + x), *zs[i + 1 :]]
            return R(y + sum(zs)), zs

        with torch.no_grad():
            for _ in range(T - 1):
                y, zs = cycle(y, zs)
        y, zs = cycle(y, zs)
        answer, new = y, {"y": y, **{f"z{i}": z for i, z in enumerate(zs)}}
    elif config.variant == "hrm":
        H, y, z = module("high"), state["y"], state["z"]
        with torch.no_grad():
            for i in range(T):
                for j in range(n):
                    if not (i == T - 1 and j == n - 1):
                        z = R(z + y + x)
                if i < T - 1:
                    y = H(y + z)
        z = R(z + y + x)
        y = H(y + z)
        answer, new = y, {"y": y, "z": z}
    else:
        answer = R(state["y"] + x)
        new = {"y": answer}

    logits = answer[:, config.prefixed :] @ model.head.weight.T
    q = answer[:, 0] @ model.q_head.weight.T + model.q_head.bias
    return {name: value.detach() for name, value in new.items()}, logits, q
