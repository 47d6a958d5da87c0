"""The audio tower: mel frames of one sound to soft tokens, a fourth as many, by a conformer.

One sound at a time and without padding: what upstream masks out does not exist here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cabochon.config import AudioConfig
from cabochon.nn.clippable import ClippableLinear
from cabochon.nn.linear import BiasedLinear, Linear
from cabochon.nn.norm import LayerNorm, RMSNorm

_MASKED = -1e9  # before the softmax; a query's own block always has a key that is not


class SubsampleLayer(nn.Module):
    """Halves time and frequency."""

    def __init__(self, channels_in: int, channels_out: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(channels_out, eps, biased=False)

    def forward(self, x: Tensor) -> Tensor:  # [channels, time, bins]
        x = F.conv2d(x, self.conv.weight.to(x.dtype), stride=2, padding=1)
        return F.relu(self.norm(x.permute(1, 2, 0))).permute(2, 0, 1)


class Subsample(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.conv_channels
        self.layer0 = SubsampleLayer(1, first, config.eps)
        self.layer1 = SubsampleLayer(first, second, config.eps)
        self.input_proj_linear = Linear(first // 4 * second, config.hidden_size)

    def forward(self, mel: Tensor) -> Tensor:  # [frames, bins] -> [frames / 4, hidden_size]
        x = self.layer1(self.layer0(mel[None]))
        return self.input_proj_linear(x.permute(1, 2, 0).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.share = config.residual_weight
        self.limit = config.gradient_clipping
        self.pre_layer_norm = RMSNorm(1e-6, hidden)
        self.ffw_layer_1 = ClippableLinear(hidden, 4 * hidden, config.clipped)
        self.ffw_layer_2 = ClippableLinear(4 * hidden, hidden, config.clipped)
        self.post_layer_norm = RMSNorm(1e-6, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre_layer_norm(clamp(x, self.limit))
        y = self.ffw_layer_2(F.silu(self.ffw_layer_1(y)))
        return x + self.post_layer_norm(clamp(y, self.limit)) * self.share


class AudioAttention(nn.Module):
    """Attention within blocks of queries and a few keys before them, with relative positions."""

    per_dim_scale: Tensor  # [head_dim]

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.head_dim = hidden // config.num_heads
        self.q_proj = ClippableLinear(hidden, hidden, config.clipped)
        self.k_proj = ClippableLinear(hidden, hidden, config.clipped)
        self.v_proj = ClippableLinear(hidden, hidden, config.clipped)
        self.relative_k_proj = Linear(hidden, hidden)
        self.per_dim_scale = nn.Parameter(torch.empty(self.head_dim), requires_grad=False)
        self.post = ClippableLinear(hidden, hidden, config.clipped)

    def forward(self, x: Tensor, relative: Tensor) -> Tensor:
        """`x [time, hidden_size]`, `relative [distances, hidden_size]`: far to near."""
        heads = (-1, self.head_dim)
        scale = F.softplus(self.per_dim_scale) * self.head_dim**-0.5 / math.log(2)
        queries = self.q_proj(x).float().unflatten(-1, heads) * scale
        keys = self.k_proj(x).float().unflatten(-1, heads) * (math.log(1 + math.e) / math.log(2))
        values = self.v_proj(x).float().unflatten(-1, heads)
        distances = self.relative_k_proj(relative).float().unflatten(-1, heads)

        blocks = self._blocks(queries)  # [blocks, heads, chunk, head_dim]
        scores = blocks @ self._context(keys).transpose(-1, -2)
        scores = scores + self._shift(blocks @ distances.permute(1, 2, 0))
        cap = self.config.logit_cap
        scores = torch.tanh(scores / cap) * cap
        scores = scores.masked_fill(~self._seen(len(x), x.device)[:, None], _MASKED)
        out = scores.softmax(dim=-1) @ self._context(values)
        return self.post(out.transpose(1, 2).flatten(0, 1).flatten(1)[: len(x)].to(x.dtype))

    @property
    def _span(self) -> int:
        """Keys that a block of queries is compared with."""
        return self.config.chunk + self.config.left - 1 + self.config.right

    def _blocks(self, x: Tensor) -> Tensor:  # [time, heads, d] -> [blocks, heads, chunk, d]
        chunk = self.config.chunk
        x = F.pad(x, (0, 0, 0, 0, 0, -len(x) % chunk))
        return x.unflatten(0, (-1, chunk)).transpose(1, 2)

    def _context(self, x: Tensor) -> Tensor:  # [time, heads, d] -> [blocks, heads, span, d]
        config = self.config
        after = config.right + -len(x) % config.chunk
        x = F.pad(x, (0, 0, 0, 0, config.left - 1, after))
        return x.unfold(0, self._span, config.chunk).transpose(-1, -2)

    def _shift(self, x: Tensor) -> Tensor:
        """From scores by distance to scores by key: `[blocks, heads, chunk, distances]` to span.

        Appendix B of Transformer-XL (arXiv 1901.02860): padding each row by one more than the span
        and reading the rows on end moves each one place further than the row before.
        """
        chunk, span = self.config.chunk, self._span
        x = F.pad(x, (0, span + 1 - x.shape[-1])).flatten(-2)
        return x[..., : chunk * span].unflatten(-1, (chunk, span))

    def _seen(self, length: int, device: torch.device) -> Tensor:
        """Which keys each query may look at: `[blocks, chunk, span]`."""
        config = self.config
        blocks = -(-length // config.chunk)
        first = torch.arange(blocks, device=device)[:, None, None] * config.chunk
        query = first + torch.arange(config.chunk, device=device)[:, None]
        key = first + torch.arange(self._span, device=device) - (config.left - 1)
        # Upstream's bounds are exclusive, so that `left` counts one key more than are seen.
        near = (query - key < config.left - 1) & (key - query < max(config.right, 1))
        return near & (key >= 0) & (key < length)


class LightConv(nn.Module):
    """A gated causal convolution over time, one kernel a channel."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden, kernel = config.hidden_size, config.conv_kernel
        self.limit = config.gradient_clipping
        self.pre_layer_norm = RMSNorm(config.eps, hidden)
        self.linear_start = ClippableLinear(hidden, 2 * hidden, config.clipped)
        self.depthwise_conv1d = nn.Conv1d(hidden, hidden, kernel, groups=hidden, bias=False)
        self.conv_norm = RMSNorm(config.eps, hidden)
        self.linear_end = ClippableLinear(hidden, hidden, config.clipped)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.linear_start(self.pre_layer_norm(x)), dim=-1)
        kernel = self.depthwise_conv1d.weight.to(y.dtype)
        past = F.pad(y.T, (kernel.shape[-1] - 1, 0))
        y = F.conv1d(past, kernel, groups=len(kernel)).T
        return x + self.linear_end(F.silu(self.conv_norm(clamp(y, self.limit))))


class AudioLayer(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.limit = config.gradient_clipping
        self.feed_forward1 = FeedForward(config)
        self.norm_pre_attn = RMSNorm(1e-6, config.hidden_size)
        self.self_attn = AudioAttention(config)
        self.norm_post_attn = RMSNorm(1e-6, config.hidden_size)
        self.lconv1d = LightConv(config)
        self.feed_forward2 = FeedForward(config)
        self.norm_out = RMSNorm(1e-6, config.hidden_size)

    def forward(self, x: Tensor, relative: Tensor) -> Tensor:
        x = self.feed_forward1(x)
        attended = self.self_attn(self.norm_pre_attn(clamp(x, self.limit)), relative)
        x = x + self.norm_post_attn(clamp(attended, self.limit))
        x = self.feed_forward2(self.lconv1d(x))
        return self.norm_out(clamp(x, self.limit))


class AudioTower(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample_conv_projection = Subsample(config)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.num_layers))
        self.output_proj = BiasedLinear(config.hidden_size, config.output_size)

    def forward(self, mel: Tensor) -> Tensor:  # [frames, bins] -> [soft tokens, output_size]
        x = self.subsample_conv_projection(mel)
        relative = self._relative(x.device).to(x.dtype)
        for layer in self.layers:
            x = layer(x, relative)
        return self.output_proj(x)

    def _relative(self, device: torch.device) -> Tensor:
        """Sines, then cosines, of distances from far to none: `[distances, hidden_size]`."""
        config = self.config
        span = config.chunk + config.left - 1 + config.right
        scales = torch.arange(config.hidden_size // 2, device=device)
        scales = torch.exp(scales * (-math.log(10_000.0) / max(config.hidden_size // 2 - 1, 1)))
        angles = torch.arange(span // 2, -1, -1, device=device)[:, None] * scales
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


def clamp(x: Tensor, limit: float) -> Tensor:
    """`x` within `limit`, or within what its dtype holds."""
    limit = min(limit, torch.finfo(x.dtype).max)
    return x.clamp(-limit, limit)
