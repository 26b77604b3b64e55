"""Several documents in one sequence: positions that start again, attention that stays inside.

Positions alone do not keep documents apart: rotary embeddings only turn queries and keys, and a
query still sees every key before it. It is the mask that does.

The mask has two forms. On the CPU it is a bias for each query and key: 0, or minus infinity. On a
GPU it lists blocks of 128 x 128 queries and keys for torch's flex attention, which visits only the
blocks in which some query sees some key and keeps no scores, so memory stays linear in S.

Legend: B batch, S sequence, N blocks in a sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

AttentionMask = Tensor | BlockMask
BLOCK = 128  # torch's default, for which its kernels are tuned
SMALLEST_HEAD = 16  # head dimension from which torch's flex attention has GPU kernels


def positions_within(documents: Tensor) -> Tensor:
    """Each token's distance from the start of its document, or of the sequence if that is later.

    Args:
        documents: `[B, S]` integers, rising along each sequence: 0, 0, 0, 1, 1, 2.

    Returns:
        `[B, S]` int64; for the sequence above [0, 1, 2, 0, 1, 0].
    """
    positions = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(positions)
    starts[:, 1:] = positions[:, 1:] * (documents[:, 1:] != documents[:, :-1])
    return positions - starts.cummax(dim=1).values


def attention_mask(documents: Tensor, head_dim: int, dtype: torch.dtype) -> AttentionMask:
    """Which keys each query sees (its own document's up to itself), in the form for the device.

    Args:
        documents: `[B, S]` integers, rising along each sequence.
        head_dim: of queries and keys.
        dtype: theirs.

    Returns:
        Blocks on a GPU; a bias on a CPU, and for heads that flex attention cannot take.
    """
    if takes_blocks(documents.device.type, head_dim):
        return blocks_within(documents)
    return bias_within(documents, dtype)


def takes_blocks(device_type: str, head_dim: int) -> bool:
    """Whether the mask is in blocks on this device."""
    return device_type == "cuda" and head_dim >= SMALLEST_HEAD


def visible_within(documents: Tensor) -> Tensor:
    """`[B, 1, S, S]` bool, queries before keys, true where a query sees a key."""
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


def bias_within(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to the scores, `[B, 1, S, S]`.

    In the dtype of the queries all layers use this one tensor. Of a bool mask torch makes such a
    tensor in every layer, and keeps each for backward.
    """
    visible = visible_within(documents)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def blocks_within(documents: Tensor) -> BlockMask:
    """The mask as blocks, from the documents at the blocks' borders alone.

    Document numbers rise along a sequence. So a block of queries sees some of an earlier block of
    keys when that one's last document is the queries' first one, and all of it when the keys' first
    document is the queries' last one. Asking the mask about every pair of positions, as torch's
    `create_block_mask` does, gives the same lists and takes S x S memory.

    Args:
        documents: `[B, S]` integers, rising along each sequence.
    """
    length = documents.shape[1]
    blocks = -(-length // BLOCK)
    padded = F.pad(documents, (0, blocks * BLOCK - length))
    first = padded[:, ::BLOCK]  # [B, N]
    last = torch.cat([padded[:, BLOCK - 1 : -1 : BLOCK], documents[:, -1:]], dim=1)
    earlier = torch.ones(blocks, blocks, dtype=torch.bool, device=documents.device).tril(-1)
    seen = (last[:, None, :] == first[:, :, None]) & earlier
    whole = (first[:, None, :] == last[:, :, None]) & earlier
    whole[:, length // BLOCK :] = False  # the last queries, when they do not fill their block
    partial = (seen & ~whole) | torch.eye(blocks, dtype=torch.bool, device=documents.device)

    def visible(index: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[index, query] == documents[index, key])

    return BlockMask.from_kv_blocks(
        *_listed(partial),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen blocks `[B, N, N]` as counts `[B, 1, N]` and numbers, those first, `[B, 1, N, N]`."""
    chosen = blocks.unsqueeze(1).to(torch.int32)
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
