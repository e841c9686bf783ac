"""The layers of Swin Transformer V2 (arXiv 2111.09883): patch embedding, window attention, blocks and patch merging."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import compat, ops
from .ops import fused_block
from .ops.linear import apply_linear, apply_mlp
from .position_bias import POSITION_BIASES, PositionBias
from .shortcuts import PLAIN, cached, has_any_size, is_plain, is_symbolic, is_traced, is_transforming, side
from .windows import PaddedWindows, Windows

MAX_LOGIT_SCALE = 100.0
zeros = cached(lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the dtype of its weights, so that autocast leaves the residual stream in float32 on any device.

    On CUDA autocast does so by itself; on CPU it would keep the half precision of the branch.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch for whole images of the batch."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """``x (B, ...)`` with whole images dropped, and the others scaled so that the mean stays."""
        return x * self.draw(x, 1)[0].view(-1, *[1] * (x.ndim - 1)) if self.drops else x

    def draw(self, x: Tensor, branches: int) -> tuple[Tensor, ...]:
        """The scales of all images of ``x (B, ...)`` for so many branches, (B, 1) each: 0, or what keeps the mean."""
        keep_prob = 1 - self.drop_prob
        return x.new_empty(branches, len(x), 1).bernoulli_(keep_prob).div_(keep_prob).unbind()

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.drop_prob > 0.0


def _pad(x, padding):
    return F.pad(x, padding) if any(padding) else x  # without padding F.pad would copy


class PatchEmbed(nn.Module):
    """Image to patch embeddings: ``(B, 3, H, W)`` to ``(B, ceil(H/patch), ceil(W/patch), C)``, zero-padded."""

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)
        self.norm = LayerNorm(embed_dims)

    def forward(self, image: Tensor) -> Tensor:
        height, width = map(side, image.shape[-2:])
        if torch.jit.is_tracing():  # the sizes become constants, so a trace has to fail at any other size
            image = image.split([height], 2)[0].split([width], 3)[0]
        # At any size: as much padding as is ever needed, because the convolution drops what makes no whole patch.
        right, bottom = (self.patch_size - 1 if is_symbolic(n) else -n % self.patch_size for n in (width, height))
        image = _pad(image, (0, right, 0, bottom))
        if not is_transforming():
            image = image.contiguous(memory_format=torch.channels_last)  # so that the norm gets a contiguous map
        return self.norm(self.proj(image).permute(0, 2, 3, 1))  # (B, H/patch, W/patch, C)


class PatchMerging(nn.Module):
    """Merge 2 x 2 neighbours: ``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 2C)``, zero-padded.

    The neighbours are concatenated column by column, as in the official code, and normalised after the reduction.
    """

    def __init__(self, embed_dims: int):
        super().__init__()
        self.reduction = nn.Linear(4 * embed_dims, 2 * embed_dims, bias=False)
        self.norm = LayerNorm(2 * embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape[0], *map(side, x.shape[1:])
        if has_any_size(x):
            x = F.pad(x, (0, 0, 0, 1, 0, 1))
            x = torch.cat([x[:, i : height + i : 2, j : width + j : 2] for j in (0, 1) for i in (0, 1)], -1)
        else:
            x = _pad(x, (0, 0, 0, width % 2, 0, height % 2))
            x = x.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
            x = x.permute(0, 1, 3, 4, 2, 5)
            x = x.to(compat.dtype_of_products(x), memory_format=torch.contiguous_format).flatten(3)  # one pass
        return self.norm(self.reduction(x))  # (B, H/2, W/2, 4C) to (B, H/2, W/2, 2C)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows: ``softmax(cos(q, k) * scale + bias) v`` (sections 3.2 and 3.3).

    Follows `WindowAttention` of the official `models/swin_transformer_v2.py`: the scale is learned per head and
    limited to 100, a position MLP gives the bias by default, and the key has no bias.

    Args:
        embed_dims (int): channels C.
        num_heads (int): attention heads, a divisor of ``embed_dims``.
        pretrained_window (int): the window size in tokens that the position bias was, or will be, trained with.
        qkv_bias (bool): whether queries and values have a bias.
        attn_drop (float): dropout of attention weights.
        proj_drop (float): dropout of the output.
        position_bias (str): log_cpb, linear_cpb or parameterized, see `POSITION_BIASES`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        pretrained_window: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        position_bias: str = 'log_cpb',
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        bias = POSITION_BIASES[position_bias](num_heads, pretrained_window)
        self._bias_name = bias.name
        self.add_module(bias.name, bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, windows: Windows | PaddedWindows, table: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x (Tensor): (B, H, W, C) on the map, or (T, C) in window order.
            windows (Windows | PaddedWindows): the windows that hold these tokens.
            table (Tensor, optional): (heads, 2H-1, 2W-1), the output of ``position_bias`` for windows of at least this
                size. If None, it is computed.

        Returns:
            Tensor: as ``x``.
        """
        qkv = apply_linear(self.qkv, x, self.qkv_bias())
        table = self.position_bias(*windows.largest) if table is None else table
        out = ops.attention(qkv, self.scale(), table, windows, self.dropout())
        return self.proj_drop(apply_linear(self.proj, out))

    @property
    def position_bias(self) -> PositionBias:
        """The module that gives the position bias."""
        return getattr(self, self._bias_name)

    def scale(self) -> Tensor:
        """The factor of the cosines, (heads, 1, 1)."""
        scale = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32))
        return scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()

    def dropout(self) -> float:
        """The probability of dropping an attention weight now."""
        return self.attn_drop if self.training else 0.0

    def qkv_bias(self) -> Tensor | None:
        """(3C,), zero for the keys; None without one."""
        if self.q_bias is None:
            return None
        return torch.cat((self.q_bias, zeros(self.v_bias.shape, self.v_bias.dtype, self.v_bias.device), self.v_bias))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, embed_dims: int, hidden_dims: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.drop, nn.Dropout) and not (self.drop.training and self.drop.p > 0):
            return apply_mlp(self.fc1, self.fc2, x)
        return self.drop(apply_linear(self.fc2, self.drop(F.gelu(apply_linear(self.fc1, x)))))


class Block(nn.Module):
    """Window attention and MLP, each normalised before it is added to the residual stream (post-norm, section 3.2).

    Args:
        embed_dims (int), num_heads (int), pretrained_window (int), qkv_bias (bool), attn_drop (float),
            position_bias (str): as in `WindowAttention`.
        mlp_ratio (float): hidden dimension of the MLP over ``embed_dims``.
        drop (float): dropout after every linear layer but qkv.
        drop_path (float): probability of dropping each of the two branches.
        extra_norm (bool): whether a LayerNorm on the main branch ends the block (huge and giant).
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        pretrained_window: int,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        extra_norm: bool = False,
        position_bias: str = 'log_cpb',
    ):
        super().__init__()
        self.attn = WindowAttention(
            embed_dims=embed_dims,
            num_heads=num_heads,
            pretrained_window=pretrained_window,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            position_bias=position_bias,
        )
        self.norm1 = LayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, int(mlp_ratio * embed_dims), drop)
        self.norm2 = LayerNorm(embed_dims)
        self.drop_path = DropPath(drop_path)
        self.norm3 = LayerNorm(embed_dims) if extra_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        windows: Windows | PaddedWindows,
        table: Tensor | None = None,
        scale1: Tensor | None = None,
        scale2: Tensor | None = None,
    ) -> Tensor:
        """Two residual branches, on a whole map or on the tokens of some windows.

        A forward hook on a block sees the map: a stage calls a block that has hooks, or is wrapped, once for all
        windows, and any other block part by part (`Stage`).

        Args:
            x (Tensor): (B, H, W, C) on the map, or (T, C) in window order.
            windows (Windows | PaddedWindows): the windows that hold these tokens.
            table (Tensor, optional): the position bias, as in `WindowAttention`.
            scale1 (Tensor, optional), scale2 (Tensor, optional): scales of the branches, which broadcast over ``x``, as
                stochastic depth draws them.

        Returns:
            Tensor: as ``x``.
        """
        if self._is_fused(x, scale1, scale2):
            x = self._fused(x, windows, table, scale1, scale2)
        else:
            x = residual(x, self.norm1(self.attn(x, windows, table)), scale1)
            x = residual(x, self.norm2(self.mlp(x)), scale2)
        return self.norm3(x)

    def _is_fused(self, x, *scales):
        """Whether `ops/fused_block.py` computes the two branches: on CUDA, with nothing but plain layers."""
        if x.device.type != ops.flash_cuda.DEVICE or x.ndim != 4 or is_traced() or not self._is_plain():
            return False
        if any(scale is not None and (scale.numel() != len(x) or scale.requires_grad) for scale in scales):
            return False
        layers = self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2, self.norm1, self.norm2
        weights = [*(layer.weight for layer in layers), self.norm1.bias, self.norm2.bias]
        if not all(type(weight) in (*PLAIN, FakeTensor) and weight.dtype == x.dtype for weight in weights):
            return False
        dtype, head_dim = compat.dtype_of_products(x), x.shape[-1] // self.attn.num_heads
        return ops.path_of(x.device, dtype, head_dim, self.attn.dropout()) is ops.flash_cuda

    def _is_plain(self):
        attn, mlp = self.attn, self.mlp
        kinds = {WindowAttention: [attn], Mlp: [mlp], nn.Linear: [attn.qkv, attn.proj, mlp.fc1, mlp.fc2]}
        kinds.update({LayerNorm: [self.norm1, self.norm2], nn.Dropout: [attn.proj_drop, mlp.drop]})
        if any(drop.training and drop.p > 0 for drop in (attn.proj_drop, mlp.drop)) or attn.qkv.bias is not None:
            return False
        return all(is_plain(layer, kind) for kind, layers in kinds.items() for layer in layers)

    def _fused(self, x, windows, table, scale1, scale2):
        attn, mlp = self.attn, self.mlp
        table = attn.position_bias(*windows.largest) if table is None else table
        half = x.to(compat.dtype_of_products(x))
        parameters = fused_block.Parameters.of(attn.qkv, attn.qkv_bias(), attn.proj, self.norm1)
        x, half = fused_block.attention_branch(
            x, half, parameters, scale1, attn.scale().float(), table.float(), windows.window, windows.shift
        )
        parameters = fused_block.Parameters.of(mlp.fc1, mlp.fc1.bias, mlp.fc2, self.norm2)
        return fused_block.mlp_branch(x, half, parameters, scale2)


def residual(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """``x + branch``, or ``x + branch * scale``."""
    return x + branch if scale is None else torch.addcmul(x, branch, scale)
