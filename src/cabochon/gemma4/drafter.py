"""A drafter: a few layers that guess what a larger model, its target, says next.

It keeps no keys and values: its layers look at those of the target, and what it knows of the text
beyond them is the target's last hidden state. So it begins to guess without reading the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cabochon.config import Clusters, Gemma4Config
from cabochon.gemma4.text import TextModel
from cabochon.nn.attention import KeyValues
from cabochon.nn.linear import Linear


class DrafterModel(nn.Module):
    """What lies under a drafter's `model.`, with the names of a whole model's part."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.language_model = TextModel(config.text)


class ClusteredTokens(nn.Module):
    """Which tokens belong together, and a vector for each cluster that is like theirs."""

    def __init__(self, hidden_size: int, vocab_size: int, clusters: Clusters) -> None:
        super().__init__()
        self.chosen = clusters.chosen
        self.centroids = Linear(hidden_size, clusters.count)
        self.register_buffer("token_ordering", torch.empty(vocab_size, dtype=torch.int64))

    token_ordering: Tensor  # [vocab_size], ids of the first cluster, then of the second, ...

    def forward(self, hidden: Tensor) -> Tensor:
        """The tokens of the likeliest clusters: `[rows, hidden_size]` to `[rows, tokens]`."""
        best = self.centroids(hidden).topk(self.chosen, dim=-1).indices
        return self.token_ordering.view(self.centroids.out_features, -1)[best].flatten(1)


class Drafter(nn.Module):
    """A drafter. Built on the meta device, as `Gemma4` is; `config.drafting` is there.

    Its layers read what the layers `kv_source` of the target keep.
    """

    def __init__(self, config: Gemma4Config, *, has_head: bool) -> None:
        super().__init__()
        assert config.drafting is not None
        self.config = config
        text, drafting = config.text, config.drafting
        self.model = DrafterModel(config)
        self.pre_projection = Linear(2 * drafting.target_size, text.hidden_size)
        self.post_projection = Linear(text.hidden_size, drafting.target_size)
        if drafting.clusters is not None:
            self.masked_embedding = ClusteredTokens(
                text.hidden_size, text.vocab_size, drafting.clusters
            )
        if has_head:
            self.lm_head = Linear(text.hidden_size, text.vocab_size)
        self.has_head = has_head

    def forward(
        self, embedded: Tensor, states: Tensor, positions: Tensor, kv: KeyValues
    ) -> tuple[Tensor, Tensor]:
        """One more guess for each row.

        Args:
            embedded: `[rows, target_size]`, the latest tokens as the target embeds them.
            states: `[rows, target_size]`, of the target where it drew a row's latest token, or what
                the last call gave.
            positions: `[rows]`, of the latest tokens that are no guesses, all the while.
            kv: what the target keeps of the tokens before.

        Returns:
            Hidden states of its own, `[rows, hidden_size]`, and states for the next call.
        """
        x = self.pre_projection(torch.cat([embedded, states], dim=-1))
        everyone = torch.arange(len(x), device=x.device)
        hidden = self.model.language_model(everyone, x, positions, kv, None)
        return hidden, self.post_projection(hidden)

    def likeliest(self, hidden: Tensor) -> Tensor:
        """The token that each row of hidden states makes the likeliest: `[rows]`."""
        head = self.lm_head if self.has_head else self.model.language_model.embed_tokens
        if not hasattr(self, "masked_embedding"):
            return head.weight.nearly(hidden).argmax(dim=-1)
        tokens = self.masked_embedding(hidden)
        best = head.weight.among(hidden, tokens).argmax(dim=1, keepdim=True)
        return tokens.gather(1, best).squeeze(1)
