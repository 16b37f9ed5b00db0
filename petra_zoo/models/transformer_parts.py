"""The branches of a transformer's block in parts: the MLP by tokens, the attention by heads.

What is made of the modules' own layers where they are the plain ones; where somebody has put others in their place
(adapters, quantised layers, a gate, a norm over all heads), the branch stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from petra_zoo.reversible.parts import PartedBranch, RowChunks, SummedParts
from petra_zoo.reversible.plain_path import carries_hook


def attention_in_groups(block: Block, groups: int) -> PartedBranch | None:
    """Attention's branch as a sum over groups of heads; None: it stays whole.

    Args:
        block: timm's, with `norm1`, `attn`, `ls1` and `drop_path1`.
        groups: how many; at most one per head.
    """
    attention = block.attn
    if groups == 1 or not _is_plain(attention):
        return None
    assert isinstance(attention, Attention)
    heads, groups = attention.num_heads, min(groups, attention.num_heads)
    bounds = [heads * i // groups for i in range(groups + 1)]
    functions = [partial(_heads, attention, block.ls1, first, last) for first, last in pairwise(bounds)]
    return SummedParts(block.norm1, functions, partial(_factor, (attention.proj_drop, block.drop_path1)))


def mlp_in_chunks(block: Block, chunks: int) -> PartedBranch | None:
    """The MLP's branch by tokens; None: it stays whole.

    Args:
        block: timm's, with `norm2`, `mlp`, `ls2` and `drop_path2`.
        chunks: how many parts all tokens are cut into.
    """
    if chunks == 1 or not isinstance(block.mlp, Mlp | GluMlp | SwiGLU):
        return None
    return RowChunks(nn.Sequential(block.norm2, block.mlp, block.ls2), chunks, partial(_factor, (block.drop_path2,)))


def _is_plain(attention: nn.Module) -> bool:
    """Whether it is what `_heads` computes, with nobody listening."""
    if type(attention) is not Attention or attention.gate is not None or type(attention.norm) is not nn.Identity:
        return False
    linear = type(attention.qkv) is nn.Linear and type(attention.proj) is nn.Linear
    return linear and not any(map(carries_hook, attention.modules()))


def _heads(attention: Attention, scale: Callable[[Tensor], Tensor], first: int, last: int, n: Tensor) -> Tensor:
    """What some of the heads add to attention's output [B, N, C]; the first of them brings the bias along."""
    batch, tokens, width = n.shape
    qkv, proj, size = attention.qkv, attention.proj, attention.head_dim
    weight = qkv.weight.view(3, attention.num_heads, size, width)[:, first:last].reshape(-1, width)
    bias = None if qkv.bias is None else qkv.bias.view(3, attention.num_heads, size)[:, first:last].reshape(-1)
    q, k, v = F.linear(n, weight, bias).view(batch, tokens, 3, last - first, size).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.fused_attn:
        p = attention.attn_drop.p if attention.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    else:
        x = attention.attn_drop((q * attention.scale @ k.transpose(-2, -1)).softmax(-1)) @ v
    x = x.transpose(1, 2).reshape(batch, tokens, -1)
    f = F.linear(x, proj.weight[:, first * size : last * size], proj.bias if first == 0 else None)
    return scale(f)


def _factor(drops: tuple[nn.Module, ...], h: Tensor) -> Tensor | None:
    """By what dropout and stochastic depth multiply a branch: [B, 1, 1], or [B, N, C] where elements are dropped."""
    whole = any(isinstance(drop, nn.Dropout) and drop.p > 0.0 and drop.training for drop in drops)
    # New, not like h: in another layout, as a reconstructed stream may have, the same draws would fall on others.
    ones = h.new_ones(h.shape if whole else (len(h), *(1,) * (h.ndim - 1)))
    factor = ones
    for drop in drops:
        factor = drop(factor)
    return None if factor is ones else factor
