"""Layers that the transformers share, up to the whole block. The names of the parameters are
timm's."""

import torch
import torch.nn.functional as F
from torch import nn

# torch's private operator for a linear layer in oneDNN; used by `linear` alone, and only if this
# version of torch has it. torch itself reaches it through its compiler (inductor) only.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def uses_onednn(x):
    """Whether `linear` computes x's product in oneDNN: eager float32 inference on a CPU."""
    if not ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling()


def linear(x, weight, bias=None):
    """x weightᵀ + bias: x [..., in], weight [out, in], bias [out] → [..., out].

    float32 inference on CPUs uses oneDNN instead of torch's default MKL, which is half as fast on
    AMD CPUs.
    """
    if uses_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def attention(q, k, v, bias=None):
    """softmax(q kᵀ / √d + bias) v; q, k and v [B, heads, tokens, d] → the same.

    In bf16 on CPUs the backward pass of torch's fused operator is slower than in float32; there the
    plain products train more than twice as fast.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Both halves in one product, the gate first (timm's SwiGLUPacked)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden // 2, dim)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block around the attention `attn`."""

    def __init__(self, attn, dim, hidden, eps, mlp="gelu", layerscale=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.ls1 = LayerScale(dim) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, hidden) if mlp == "swiglu" else Mlp(dim, hidden)
        self.ls2 = LayerScale(dim) if layerscale else nn.Identity()

    def forward(self, x, positions=None, first=False):
        """x [B, T, dim] → the same; first: the first token alone → [B, 1, dim].

        positions: what this kind of attention needs to know of the tokens' places.
        """
        attended = self.ls1(self.attn(self.norm1(x), positions, first))
        if first:
            x = x[:, :1]
        x = x + attended
        return x + self.ls2(self.mlp(self.norm2(x)))
