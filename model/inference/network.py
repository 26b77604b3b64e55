"""The model in the form that decoding wants: a Llama's trunk, and its heads as one stacked layer.

Heads that are several layers, or that read one another, are layers like the trunk's instead: they
run over all new positions, since each needs the others' output there. Linear heads keep no cache.

It computes what `model.language_model` computes, over new positions with a cache. Nothing here
waits for the device, and all shapes follow from those of the arguments.

Legend: B rows, S new positions, Q positions with queries, N = B * S, W keys looked at, M heads
that are run, H hidden, A attention heads, G key-value heads, R = A / G, D head dimension, V
vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.inference.cache import WIDTH_STEP, Block, Cache
from model.inference.norm import RMSNorm
from model.inference.products import Matrix, add_product, add_products, product, products
from model.inference.weights import (
    HeadWeights,
    LayerWeights,
    LinearHeads,
    NetworkWeights,
    Read,
    SerialHeads,
    read_weights,
)
from model.operations.rotary import RotaryTable

_FIRST_POSITIONS = 1024


class Network:
    """Forwards of trunk and heads.

    Args:
        config: sizes.
        weights: as `read_weights` gives them.

    Attributes:
        num_heads: n.
        dtype: of weights and results.
        device: where they are.
        forwards: of its trunk over new tokens, that were made.
    """

    def __init__(self, config: ModelConfig, weights: NetworkWeights) -> None:
        self.config = config
        self.weights = weights
        self.num_heads = config.future_tokens
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.forwards = 0
        self._norm = RMSNorm(config.hidden_size, config.norm_eps, self.dtype, self.device)
        self._some_heads: dict[tuple[int, int], HeadWeights] = {}
        self._per_group = config.attention_heads // config.kv_heads
        self._rotary = RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling)
        self._table = self._numbers = torch.empty(0)

    @classmethod
    def read(
        cls,
        config: ModelConfig,
        tensor: Read,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> "Network":
        """A network from tensors under their Hugging Face names, see `read_weights`."""
        device = device or torch.device("cpu")
        return cls(config, read_weights(config, tensor, dtype, device))

    def new_cache(self, rows: int, capacity: int, heads: int | None = None) -> Cache:
        """An empty cache, for at least `capacity` positions.

        A whole number of steps of the width: kernels on GPUs want masks of even rows.

        Args:
            rows: how many there is room for.
            capacity: of each.
            heads: how many, from the first, are to be used; None = all.
        """
        capacity = -(-capacity // WIDTH_STEP) * WIDTH_STEP
        sizes, dim = self.cache_sizes(heads or self.num_heads), self.config.head_dim
        return Cache.zeros(sizes, rows, capacity, dim, self.dtype, self.device)

    def cache_sizes(self, heads: int) -> list[int]:
        """G of each buffer of a cache: those of the trunk's layers, then those of heads."""
        groups, config = self.config.kv_heads, self.config
        sizes = [groups] * config.trunk_layers
        if isinstance(self.weights.heads, HeadWeights):
            sizes += [heads * groups]
        elif isinstance(self.weights.heads, SerialHeads):
            sizes += [groups] * (max(heads, len(config.next_token_heads)) * config.layers_per_head)
        return sizes

    def block(
        self, cache: Cache, positions: Tensor, places: Tensor, mask: Tensor | None, width: int
    ) -> Block:
        """Where new tokens stand.

        Args:
            cache: of the rows.
            positions: `[B, S]` positions in the text.
            places: `[B, S]` places in the row's part of the cache.
            mask: `[B or 1, S, W]` bool, true where a query does not see a key; None: the new
                tokens are their rows' first.
            width: W, more than any position that is in use.
        """
        cosine, sine = self._rotation(width)[positions.flatten()].unbind(1)
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=self.dtype, device=self.device)
            mask = bias.masked_fill_(mask, -torch.inf)
            if mask.shape[1] > 1 and self._per_group > 1:
                mask = mask.repeat_interleave(self._per_group, dim=1)
            mask = mask.unsqueeze(1)
        slots = cache.slots(places).flatten()
        return Block(positions.shape[0], cosine, sine, slots, mask, width)

    def following(self, cache: Cache, num_positions: int, width: int) -> Block:
        """The block of the next S tokens of every row."""
        numbers = self.numbers(width)
        positions = cache.lengths.unsqueeze(1) + numbers[:num_positions]
        unseen = numbers > positions.unsqueeze(-1)
        return self.block(cache, positions, positions, unseen, width)

    def trunk(self, tokens: Tensor, cache: Cache, block: Block) -> Tensor:
        """Run the trunk over new tokens `[B, S]` and fill its part of the cache; z `[N, H]`."""
        self.forwards += 1
        hidden = F.embedding(tokens.flatten(), self.weights.embedding)
        return self.transform(hidden, cache, block)

    def transform(self, hidden: Tensor, cache: Cache, block: Block) -> Tensor:
        """The same over embeddings `[N, H]`."""
        return self.run_layers(hidden, self.weights.trunk, 0, cache, block)

    def run_layers(
        self,
        hidden: Tensor,
        layers: Sequence[LayerWeights[Matrix]],
        first: int,
        cache: Cache,
        block: Block,
    ) -> Tensor:
        """Run layers over new positions `[N, H]` and fill their buffers, from number `first` on."""
        for index, layer in enumerate(layers, first):
            hidden = self._layer(hidden, index, layer, cache, block)
        return hidden

    def fill_heads(self, trunk_output: Tensor, heads: int, cache: Cache, block: Block) -> Tensor:
        """Put the keys and values of heads 1 .. `heads` at all new positions into the cache.

        Args:
            trunk_output: z `[N, H]`.
            heads: how many.
            cache: of the rows.
            block: of the new positions.

        Returns:
            What `heads` takes: z `[N, H]`, or what each head has given already, `[M, N, H]`.
        """
        if isinstance(self.weights.heads, LinearHeads):
            return trunk_output
        if isinstance(self.weights.heads, SerialHeads):
            return self._run_serially(self.weights.heads, trunk_output, heads, cache, block)
        weights = self._heads(1, heads)
        normed = self._norm(trunk_output, weights.attention_norm)
        new = products(normed, weights.key_value)
        new = new.view(heads, -1, 2, self.config.kv_heads, self.config.head_dim)
        self._rotate(new[:, :, 0], block)
        self._write_heads(new, cache, block)
        return trunk_output

    def heads(
        self, trunk_output: Tensor, first: int, last: int, cache: Cache, block: Block
    ) -> Tensor:
        """Run heads `first` .. `last` at some positions whose keys and values are in the cache.

        Args:
            trunk_output: of what `fill_heads` gave, `[B * Q, H]` or `[M, B * Q, H]`, these
                positions.
            first: number of the first head, from 1.
            last: number of the last one.
            cache: of the rows.
            block: of these positions.

        Returns:
            `[M, B * Q, H]`, before the shared norm.
        """
        if isinstance(self.weights.heads, SerialHeads):
            return trunk_output[first - 1 : last]
        if isinstance(self.weights.heads, LinearHeads):
            return products(trunk_output, self.weights.heads.maps[first - 1 : last])
        weights = self._heads(first, last)
        num, rows = last - first + 1, block.rows
        groups, dim = self.config.kv_heads, self.config.head_dim
        hidden = trunk_output.expand(num, -1, -1)
        query = products(self._norm(trunk_output, weights.attention_norm), weights.query)
        query = query.view(num, hidden.shape[1], -1, dim)
        self._rotate(query, block)
        # [M, B, Q * R, G, D] to [B, Q * R, M * G, D]
        query = query.view(num, rows, -1, groups, dim).permute(1, 2, 0, 3, 4).flatten(2, 3)
        key, value = cache.read(
            self.config.trunk_layers, block.width, (first - 1) * groups, last * groups
        )
        mixed = self._attend(query, key, value, block)
        mixed = mixed.reshape(hidden.shape[1], -1, num, groups, dim).permute(2, 0, 1, 3, 4)
        hidden = add_products(hidden, mixed.reshape(num, hidden.shape[1], -1), weights.output)
        gate_up = products(self._norm(hidden, weights.mlp_norm), weights.gate_up)
        return add_products(hidden, _swiglu(gate_up), weights.down)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of outputs `[..., H]` of head 1."""
        return product(self._norm(hidden, self.weights.norm), self.weights.unembedding)

    def head_logits(self, hidden: Tensor, first: int) -> Tensor:
        """Logits `[M, N, V]` of outputs `[M, N, H]` of the heads from `first` on."""
        if self.weights.own_unembeddings is None:
            return self.logits(hidden)
        unembeddings = self.weights.own_unembeddings[first - 1 : first - 1 + len(hidden)]
        return products(self._norm(hidden, self.weights.norm), unembeddings)

    def _run_serially(
        self, weights: SerialHeads, hidden: Tensor, heads: int, cache: Cache, block: Block
    ) -> Tensor:
        """What heads 1 .. `heads` give at all new positions, `[M, N, H]`; M is n if anticausal."""
        config = self.config
        wanted = {*range(1, heads + 1), *config.next_token_heads}
        outputs = {}
        for place, head in enumerate(config.head_order):
            if head not in wanted:
                break  # of a chain and of heads side by side these are the last
            first = config.trunk_layers + place * config.layers_per_head
            output = self.run_layers(hidden, weights.layers[head], first, cache, block)
            outputs[head] = output
            if config.chain:
                hidden = output
        return torch.stack([outputs[head] for head in sorted(outputs)])

    def _layer(
        self, hidden: Tensor, index: int, weights: LayerWeights[Matrix], cache: Cache, block: Block
    ) -> Tensor:
        """One layer of the trunk, `[N, H]` to `[N, H]`."""
        groups, dim = self.config.kv_heads, self.config.head_dim
        normed = self._norm(hidden, weights.attention_norm)
        qkv = product(normed, weights.qkv).view(hidden.shape[0], -1, dim)
        self._rotate(qkv[:, :-groups], block)
        cache.write(index, block.slots, qkv[:, -2 * groups :].view(-1, 2, groups, dim))
        query = qkv[:, : -2 * groups].reshape(block.rows, -1, groups, dim)
        key, value = cache.read(index, block.width, 0, groups)
        mixed = self._attend(query, key, value, block)
        hidden = add_product(hidden, mixed.reshape(hidden.shape[0], -1), weights.output)
        normed = self._norm(hidden, weights.mlp_norm)
        return add_product(hidden, _swiglu(product(normed, weights.gate_up)), weights.down)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> Tensor:
        """Attention; the R queries of a group are R more positions of one.

        Args:
            query: `[B, Q * R, G', D]`.
            key: `[B, G', W, D]`.
            value: `[B, G', W, D]`.
            block: of the queries.

        Returns:
            `[B, Q * R, G', D]`.
        """
        if block.mask is not None:
            return F.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, attn_mask=block.mask
            ).transpose(1, 2)
        # Causal from the start of the text: as torch's fast kernels want it.
        repeats = self._per_group
        num = query.shape[1] // repeats
        query = query.unflatten(1, (num, repeats)).permute(0, 3, 2, 1, 4).flatten(1, 2)
        out = F.scaled_dot_product_attention(
            query, key[:, :, :num], value[:, :, :num], is_causal=True, enable_gqa=repeats > 1
        )
        return out.unflatten(1, (-1, repeats)).permute(0, 3, 2, 1, 4).flatten(1, 2)

    def _write_heads(self, new: Tensor, cache: Cache, block: Block) -> None:
        """Write keys and values `[M, N, 2, G, D]` of heads 1 .. M."""
        cache.write(self.config.trunk_layers, block.slots, new.permute(1, 2, 0, 3, 4).flatten(2, 3))

    def _heads(self, first: int, last: int) -> HeadWeights:
        """Views of the weights of some heads, made once."""
        if (first, last) not in self._some_heads:
            assert isinstance(self.weights.heads, HeadWeights)
            self._some_heads[first, last] = self.weights.heads.between(first, last)
        return self._some_heads[first, last]

    def _rotate(self, states: Tensor, block: Block) -> None:
        """Turn queries or keys `[..., N, heads, D]` by their positions, in place."""
        swapped = states.roll(self.config.head_dim // 2, dims=-1)
        states.mul_(block.cosine).addcmul_(swapped, block.sine)

    def numbers(self, count: int) -> Tensor:
        """`[count]` 0, 1, ..; a view of numbers that are made once."""
        self._rotation(count)
        return self._numbers[:count]

    def _rotation(self, width: int) -> Tensor:
        """`[at least W, 2, 1, D]` cosines and signed sines of positions 0 .. W - 1."""
        if self._table.shape[0] < width:
            length = max(width, 2 * self._table.shape[0], _FIRST_POSITIONS)
            half = self.config.head_dim // 2
            angles = self._rotary.angles(torch.arange(length, device=self.device))
            angles = angles[:, 0, :, :half]
            cosine, sine = angles.cos(), angles.sin()
            table = torch.stack(
                [torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)], dim=1
            )
            self._table = table.to(self.dtype)
            self._numbers = torch.arange(length, device=self.device)
        return self._table


def _swiglu(gate_up: Tensor) -> Tensor:
    """`[..., F]` from gate and up `[..., 2F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
