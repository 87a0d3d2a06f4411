"""Position encodings of a backbone built from scratch, as published beside Intra-Layer Recurrence (arXiv 2505.01855).

Attention scores are `S_ij = scale q_i . k_j` over the keys a query may see. What an encoding adds to them:

    nope, learned, rope    nothing (learned: a table added to the embedding; rope: q and k are rotated)
    alibi                  -m_h (i - j), slopes m_h fixed                              Press et al., arXiv 2108.12409
    fire                   MLP(log(1 + |c (i-j)|) / (log(1 + |c max(i, |a L0|)|) + 1e-6))   Li et al., arXiv 2310.04418
    cope                   q_i . P at p_ij = sum of sigmoid(S_ik) over k >= j, between two columns linearly
                                                                                       Golovneva et al., 2405.18719

`i - j` counts rows, so neither padding nor packing changes it; fire's `max(i, .)` is the position in the document.
"""

from __future__ import annotations

from math import ceil, log2

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

POSITIONS = ("nope", "rope", "learned", "alibi", "cope", "fire")
BLOCK = 64  # queries that attention takes at a time on CPU: their scores stay in the cache, later keys are skipped
PIECE = 4096  # numbers that FIRE's MLP takes at a time
FIRE_EPS = 1e-6


def alibi_slopes(heads: int) -> list[float]:
    """`m_k = 2^(-8k/n)` for k = 1..n, n the power of two at or above `heads`; if above, every second one first."""
    n = 2 ** ceil(log2(heads))
    slopes = [2 ** (-8 * k / n) for k in range(1, n + 1)]
    return slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads]


def alibi(rows_1T: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """`bias_1THK` over the K = newest row + 1 keys, the lowest number at keys after the query."""
    keys_K = torch.arange(int(rows_1T[0, -1]) + 1, device=rows_1T.device)
    distance_1T1K = (rows_1T[..., None] - keys_K)[:, :, None]
    slopes_H1 = torch.tensor(alibi_slopes(heads), device=rows_1T.device, dtype=dtype)[:, None]
    return (-slopes_H1 * distance_1T1K).masked_fill(distance_1T1K < 0, torch.finfo(dtype).min)


class Fire(nn.Module):
    """FIRE's bias of one layer; c, a and the threshold L0 are trained, as the published training does.

    The MLP sees one number, which depends on the distance alone as long as i <= |a L0|: so it runs once on every
    distance, and on pairs of query and key only for queries beyond.

    Args:
        heads: H; `hidden`: width of the MLP.
        scale: c at the start; `threshold`: L0 at the start.
    """

    def __init__(self, heads: int, scale: float = 0.1, threshold: float = 512.0, hidden: int = 32):
        super().__init__()
        self.start = {"c": scale, "a": 1.0, "threshold": threshold}
        self.c, self.a, self.threshold = (nn.Parameter(torch.tensor(x)) for x in self.start.values())
        # Plain parameters, since the MLP is not a projection of tokens: what is counted or adapted per token skips it.
        self.in_weight, self.in_bias = nn.Parameter(torch.empty(hidden)), nn.Parameter(torch.empty(hidden))
        self.out_weight, self.out_bias = nn.Parameter(torch.empty(heads, hidden)), nn.Parameter(torch.empty(heads))

    def forward(self, position_ids_BT: Tensor, rows_1T: Tensor) -> Tensor:
        """`bias_BTHK` over the K = newest row + 1 keys (B is 1 unless rows differ beyond the threshold)."""
        keys_K = torch.arange(int(rows_1T[0, -1]) + 1, device=rows_1T.device)
        distance_1TK = rows_1T[..., None] - keys_K
        limit, weights = (_wide(self.a) * _wide(self.threshold)).abs(), (self.in_weight, self.in_bias, self.out_weight)
        near_K, norm_BT = self._log(keys_K), self._log(torch.maximum(position_ids_BT.to(limit.dtype), limit))
        beyond_BTK = (position_ids_BT > limit)[..., None] & (distance_1TK >= 0)
        pairs, index_BTK = beyond_BTK.nonzero(as_tuple=True), distance_1TK.clamp(min=0)
        x = near_K / (self._log(limit) + FIRE_EPS)
        if len(pairs[0]):
            far_N = near_K[distance_1TK.expand_as(beyond_BTK)[pairs]] / (norm_BT[pairs[:2]] + FIRE_EPS)
            index_BTK = index_BTK.expand_as(beyond_BTK).clone()
            index_BTK[pairs] = torch.arange(len(x), len(x) + len(far_N), device=x.device)
            x = torch.cat([x, far_N])
        with torch.autocast(x.device.type, enabled=False):
            bias_HN = _Mlp.apply(x, *map(_wide, weights)) + self.out_bias[:, None]
        bias_HBTK = bias_HN.index_select(1, index_BTK.flatten()).unflatten(1, index_BTK.shape)
        return bias_HBTK.permute(1, 2, 0, 3)

    def _log(self, x: Tensor) -> Tensor:
        return torch.log1p((_wide(self.c) * x).abs())


class _Mlp(torch.autograd.Function):
    """`W relu(w x + b)` of single numbers, `_N -> _HN`, in pieces that stay in the cache; backward makes hidden anew.

    The hidden layer of every pair of query and key, kept for the backward, would be the largest tensor of the model.
    """

    @staticmethod
    def forward(ctx, x_N, in_weight, in_bias, out_weight):
        ctx.save_for_backward(x_N, in_weight, in_bias, out_weight)
        return torch.cat([out_weight @ _hidden(x, in_weight, in_bias) for x in x_N.split(PIECE)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_HN):
        x_N, in_weight, in_bias, out_weight = ctx.saved_tensors
        d_x, found = [], [torch.zeros_like(w) for w in (in_weight, in_bias, out_weight)]
        for x, d_out in zip(x_N.split(PIECE), d_HN.split(PIECE, 1), strict=True):
            hidden = _hidden(x, in_weight, in_bias)
            d = torch.ops.aten.threshold_backward(out_weight.T @ d_out, hidden, 0)
            for total, piece in zip(found, (d @ x, d.sum(1), d_out @ hidden.T), strict=True):
                total += piece
            d_x.append(in_weight @ d)
        return torch.cat(d_x), *found


def _hidden(x_N: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias[:, None], weight[:, None], x_N[None]).relu_()


class Cope(nn.Module):
    """CoPE's table of one layer, `table_EP`, zero at the start and shared by the heads; positions above P-1 are P-1."""

    def __init__(self, head_width: int, size: int):
        super().__init__()
        self.table_EP = nn.Parameter(torch.zeros(head_width, size))


def attend(
    q_BHSE: Tensor,
    k_BHKE: Tensor,
    v_BHKE: Tensor,
    mask_B1SK: Tensor | None,
    scale: float,
    bias_BHSK: Tensor | None = None,
    table_EP: Tensor | None = None,
) -> Tensor:
    """Attention with a trained bias, or with contextual positions, `o_BHSE`.

    Args:
        mask_B1SK: what a query may see (None: as many keys as queries, causal; or one query that sees all).
        bias_BHSK: added to the scores (dimension 0 may be 1).
        table_EP: CoPE's.
    """
    dtype = v_BHKE.dtype
    q, k, bias, table = (None if x is None else x.to(dtype) for x in (q_BHSE, k_BHKE, bias_BHSK, table_EP))
    if table is not None:  # positions are cut at the last column, which this repeats: no slope leads beyond it
        table = torch.cat([table, table[:, -1:]], 1)
    with torch.autocast(v_BHKE.device.type, enabled=False):  # dtypes are settled: the backward must see the same
        return _Attention.apply(q, k, v_BHKE, mask_B1SK, scale, bias, table)


class _Attention(torch.autograd.Function):
    """`softmax(scale q k^T + what the encoding adds) v` in blocks of queries, each over the keys it can see.

    Torch's fused attention is slow in the gradient of a bias, and cannot do CoPE, whose positions depend on the scores.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, bias, table):
        (S, K), out, saved = (q.shape[2], k.shape[2]), torch.empty_like(q), []
        causal, size = mask is None and S == K, BLOCK if q.device.type == "cpu" else S
        ctx.blocks = [(a, min(a + size, S), min(a + size, S) if causal else K) for a in range(0, S, size)]
        ctx.scale, ctx.bias_shape = scale, None if bias is None else bias.shape
        scaled = scale * q
        for a, b, n in ctx.blocks:
            s = _wide(scaled[:, :, a:b] @ k[:, :, :n].mT)
            if bias is not None:
                s += bias[:, :, a:b, :n]
            if mask is not None:
                s.masked_fill_(~mask[:, :, a:b], torch.finfo(s.dtype).min)
            elif causal:
                later = torch.ones(b - a, b - a, dtype=torch.bool, device=s.device).triu_(1)
                s[..., a:].masked_fill_(later, torch.finfo(s.dtype).min)
            if table is not None:
                added, *context = _contextual(s, _wide(q[:, :, a:b] @ table[:, : n + 2]))
                s += added
                saved += context
            p = torch.softmax(s, -1).to(v.dtype)
            saved.append(p)
            out[:, :, a:b] = p @ v[:, :, :n]
        ctx.save_for_backward(q, k, v, out, table, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, table, *saved = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_bias = None if ctx.bias_shape is None else q.new_zeros(ctx.bias_shape)
        d_table = torch.zeros_like(table) if ctx.needs_input_grad[6] else None
        along = _wide(d_out * out).sum(-1, keepdim=True)
        kept = iter(saved)
        for a, b, n in ctx.blocks:
            context = () if table is None else (next(kept), next(kept), next(kept))
            p, d, q_block = next(kept), d_out[:, :, a:b], q[:, :, a:b]
            dv[:, :, :n] += p.mT @ d
            ds = _wide(d @ v[:, :, :n].mT).sub_(along[:, :, a:b]).mul_(p)
            if d_bias is not None:
                block = d_bias[:, :, a:b, :n]
                block.copy_(ds.sum_to_size(block.shape))
            if table is not None:
                columns = table[:, : n + 2]
                through, d_z = _contextual_backward(ds, *context, columns.shape[1])
                ds += through
                d_z = d_z.to(q.dtype)
                if d_table is not None:
                    d_table[:, : n + 2] += torch.einsum("bhse,bhsp->ep", q_block, d_z)
            ds = ds.to(q.dtype)
            dq[:, :, a:b] = (ds @ k[:, :, :n]).mul_(ctx.scale)
            if table is not None:
                dq[:, :, a:b] += d_z @ columns.T
            dk[:, :, :n] += ds.mT @ q_block
        return dq, dk.mul_(ctx.scale), dv, None, None, d_bias, d_table


def _contextual(s_BHSK: Tensor, z_BHSP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What CoPE adds to masked scores, and what its gradient needs: gates, positions, slopes between two columns.

    z holds the value at every whole position, the last one twice, or all that so many keys can reach.
    """
    gate = torch.sigmoid(s_BHSK)
    position = gate.flip(-1).cumsum_(-1).flip(-1)
    if z_BHSP.shape[-1] < s_BHSK.shape[-1] + 2:
        position.clamp_(max=z_BHSP.shape[-1] - 2)
    column = position.long()
    slope = z_BHSP.diff(dim=-1).gather(-1, column)
    return z_BHSP.gather(-1, column).addcmul_(position.frac(), slope), gate, position, slope


def _contextual_backward(d: Tensor, gate: Tensor, position: Tensor, slope: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """Gradients of what `_contextual` adds, with respect to the scores and to z."""
    column, above = position.long(), position.frac().mul_(d)
    d_z = d.new_zeros(*d.shape[:-1], P)
    d_z[..., 1:].scatter_add_(-1, column, above)
    d_z.scatter_add_(-1, column, d - above)
    return torch.ops.aten.sigmoid_backward((d * slope).cumsum_(-1), gate), d_z


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32: what a softmax and sums over keys need."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
