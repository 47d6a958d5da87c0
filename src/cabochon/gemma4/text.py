"""The text decoder. A step's tokens come as one row each; the cache knows whose they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cabochon.config import LayerConfig, TextConfig
from cabochon.nn.attention import KeyValues
from cabochon.nn.experts import Experts, Router
from cabochon.nn.linear import Embedding, Linear
from cabochon.nn.norm import RMSNorm
from cabochon.nn.rotary import Rotation, rotate, text_rotation

LayerCall = Callable[[Tensor, Tensor | None, Rotation, KeyValues], Tensor]


class TextCall(Protocol):
    """Computes what lies between embeddings and head, in float32."""

    def __call__(
        self,
        x: Tensor,
        found: Tensor | None,
        positions: Tensor,
        kv: KeyValues,
        wanted: Tensor | None,
    ) -> Tensor:
        """As `TextModel.forward`; `x` is overwritten, `found [tokens, layers * ple_dim]` by id."""
        ...


class Attention(nn.Module):
    """Grouped-query attention without scaling. A layer that shares keys and values makes none."""

    def __init__(self, config: TextConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.layer = layer
        dim = layer.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_heads * dim)
        self.q_norm = RMSNorm(config.eps, dim)
        if not layer.shares_kv:
            self.k_proj = Linear(config.hidden_size, layer.kv_heads * dim)
            self.k_norm = RMSNorm(config.eps, dim)
            if not layer.k_eq_v:
                self.v_proj = Linear(config.hidden_size, layer.kv_heads * dim)
            self.v_norm = RMSNorm(config.eps)
        self.o_proj = Linear(config.num_heads * dim, config.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation, kv: KeyValues) -> Tensor:
        queries = rotate(self.q_norm(self._heads(self.q_proj(x))), rotation)
        if not self.layer.shares_kv:
            keys = self._heads(self.k_proj(x))
            values = keys if self.layer.k_eq_v else self._heads(self.v_proj(x))
            kv.write(self.layer.index, rotate(self.k_norm(keys), rotation), self.v_norm(values))
        return self.o_proj(kv.attend(self.layer.kv_source, queries).flatten(1))

    def _heads(
        self, x: Tensor
    ) -> Tensor:  # [tokens, heads * head_dim] -> [tokens, heads, head_dim]
        return x.unflatten(-1, (-1, self.layer.head_dim))


class MLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP between norms, then the layer's own input, then a scalar for all of it."""

    def __init__(self, config: TextConfig, layer: LayerConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.eps
        self.kind = layer.kind
        self.input_layernorm = RMSNorm(eps, hidden)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(eps, hidden)
        self.pre_feedforward_layernorm = RMSNorm(eps, hidden)
        self.mlp = MLP(hidden, layer.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(eps, hidden)
        self.mixed = config.experts is not None
        if config.experts is not None:
            experts = config.experts
            self.router = Router(hidden, experts.count, experts.chosen, eps)
            self.experts = Experts(hidden, experts.intermediate_size, experts.count)
            self.post_feedforward_layernorm_1 = RMSNorm(eps, hidden)
            self.pre_feedforward_layernorm_2 = RMSNorm(eps, hidden)
            self.post_feedforward_layernorm_2 = RMSNorm(eps, hidden)
        if config.ple_dim:
            self.per_layer_input_gate = Linear(hidden, config.ple_dim)
            self.per_layer_projection = Linear(config.ple_dim, hidden)
            self.post_per_layer_input_norm = RMSNorm(eps, hidden)
        self.register_buffer("layer_scalar", torch.empty(1))

    layer_scalar: Tensor

    def forward(self, x: Tensor, own: Tensor | None, rotation: Rotation, kv: KeyValues) -> Tensor:
        """`x [tokens, hidden_size]`, `own [tokens, ple_dim]`: this layer's part of the inputs."""
        attended = self.self_attn(self.input_layernorm(x), rotation, kv)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self._feed_forward(x))
        if own is not None:
            gated = F.gelu(self.per_layer_input_gate(x), approximate="tanh") * own
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar.to(x.dtype)

    def _feed_forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.mixed:
            return made
        # The router sees the residual itself; the experts see it through a norm of their own.
        mixed = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x))
        first = self.post_feedforward_layernorm_1(made)
        return first + self.post_feedforward_layernorm_2(mixed)


class TextModel(nn.Module):
    """Embeddings, per-layer embeddings, decoder layers, and the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        hidden, eps, depth = config.hidden_size, config.eps, len(config.layers)
        self.embed_tokens = Embedding(config.vocab_size, hidden, scale=hidden**0.5)
        if config.ple_dim:
            width = depth * config.ple_dim
            scale = config.ple_dim**0.5
            self.embed_tokens_per_layer = Embedding(config.ple_vocab_size, width, scale=scale)
            self.per_layer_model_projection = Linear(hidden, width)
            self.per_layer_projection_norm = RMSNorm(eps, config.ple_dim)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(eps, hidden)
        # Layers of a kind and head size turn alike; each knows which of those it is.
        kinds = [(layer.kind, layer.head_dim) for layer in config.layers]
        self.kinds = list(dict.fromkeys(kinds))
        self.turns = [self.kinds.index(kind) for kind in kinds]
        # What computes a layer in its module's place; a pass over the built tree fills it.
        self.fused: dict[int, LayerCall] = {}
        # What computes them all at once in float32, if each of them is fused.
        self.together: TextCall | None = None

    def forward(
        self, ids: Tensor, x: Tensor, positions: Tensor, kv: KeyValues, wanted: Tensor | None
    ) -> Tensor:
        """Hidden states of the rows `wanted`, after the final norm.

        Args:
            ids: `[tokens]`; soft tokens hold the padding id.
            x: `[tokens, hidden_size]`, embeddings with soft tokens in their places; it may be
                overwritten.
            positions: `[tokens]`.
            kv: the step's view of the cache.
            wanted: `[rows]`, sorted; None: all. From the first layer that shares keys and values
                on, nothing is written any more, so only these rows go through the rest of the
                model.
        """
        found = self.embed_tokens_per_layer(ids, x.dtype) if self.config.ple_dim else None
        if self.together is not None and x.dtype is torch.float32:
            return self.together(x, found, positions, kv, wanted)
        own = None if found is None else self._layer_inputs(x, found)
        layers = range(len(self.layers))
        if wanted is not None:
            writing = sum(not layer.shares_kv for layer in self.config.layers)
            x = self._compute(layers[:writing], x, own, positions, kv)[wanted]
            layers = layers[writing:] if len(wanted) else range(0)
            if layers:
                kv, positions = kv.narrow(wanted.tolist()), positions[wanted]
                own = None if own is None else own[wanted]
        return self.norm(self._compute(layers, x, own, positions, kv))

    def _compute(
        self, layers: range, x: Tensor, own: Tensor | None, positions: Tensor, kv: KeyValues
    ) -> Tensor:
        """What `layers` make of `x`."""
        rope = self.config.rope
        turned = [text_rotation(positions, dim, rope[kind], x.dtype) for kind, dim in self.kinds]
        for index in layers:
            compute = self.fused.get(index, self.layers[index])
            part = None if own is None else own[:, index]
            x = compute(x, part, turned[self.turns[index]], kv)
        return x

    def _layer_inputs(self, x: Tensor, found: Tensor) -> Tensor:
        """What each layer gets of each token, `[tokens, layers, ple_dim]`: by id and by context."""
        shape = (len(self.config.layers), self.config.ple_dim)
        context = self.per_layer_model_projection(x).unflatten(-1, shape)
        context = self.per_layer_projection_norm(context * self.config.hidden_size**-0.5)
        return (context + found.unflatten(-1, shape)) * 2**-0.5
