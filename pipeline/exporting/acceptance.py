"""How often the exported heads agree with head 1 on the run's held-out text.

The form of the model that decodes runs over held-out sequences, all positions at once; documents of
a sequence see one another. It is whole in memory, so larger models go without.

Legend: n heads, B batch, S sequence, H hidden.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from data_prep.shards.shard_set import ShardSet
from model.errors import CheckpointError
from model.hugging_face.acceptance import MOST_SPREAD, Acceptance
from model.hugging_face.folder import ALL_HEADS_INDEX_NAME, TOKENIZER_NAME, ExportDescription
from model.hugging_face.stored_tensors import StoredTensors
from model.inference.network import Network
from model.loss import IGNORED
from model.operations.agreement import agreement_counts, tree_counts
from pipeline.config.run_config import RunConfig
from pipeline.data.validation import ValidationSamples

_POSITIONS = 4096
_LOGIT_ROWS = 256  # positions whose logits exist at once


def measure_acceptance(
    folder: Path, config: RunConfig, description: ExportDescription, tokenizer: bytes
) -> Acceptance:
    """Agreement of the heads of a written folder on held-out sequences.

    Args:
        folder: with the written tensors.
        config: the run, whose shards have the sequences.
        description: what the export is of.
        tokenizer: the checkpoint's tokenizer.json.

    Raises:
        CheckpointError: the checkpoint's tokenizer is not that of the shards.
        DataError: the shards are gone, or have no such split.
    """
    shards = ShardSet.open(config.data.shards, config.data.eval_split)
    if shards.manifest.tokenizer.sha256 != hashlib.sha256(tokenizer).hexdigest():
        raise CheckpointError(
            f"{config.data.shards} has another {TOKENIZER_NAME} by now; export "
            "where the shards of the run are"
        )
    tensors = StoredTensors(folder, ALL_HEADS_INDEX_NAME)
    network = Network.read(description.model, tensors.whole, torch.float32)
    heads = description.model.future_tokens
    counts = torch.zeros(heads, dtype=torch.long)
    within = torch.zeros(MOST_SPREAD, heads, dtype=torch.long)
    compared = 0
    for batch in ValidationSamples(config, shards, data_rank=0, data_size=1):
        valid = (batch.labels != IGNORED).transpose(1, 2)
        predictions, ranks = head_predictions(network, batch.tokens)
        counts += agreement_counts(predictions, valid)
        within += tree_counts(ranks, valid, MOST_SPREAD)
        compared += batch.tokens.numel()
        if compared >= _POSITIONS:
            break
    return Acceptance(
        agreed=tuple(counts.tolist()), within=tuple(tuple(each) for each in within.tolist())
    )


@torch.inference_mode()
def head_predictions(network: Network, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What every head says at every position, and how near it is to what head 1 says there later.

    Args:
        network: the model.
        tokens: `[B, S]`.

    Returns:
        `[n, S, B]` the likeliest tokens, and `[n, S, B]` how many tokens head k at t finds
        likelier than what head 1 finds likeliest at t + k - 1 (any number past the end).
    """
    rows, length = tokens.shape
    cache = network.new_cache(rows, length)
    positions = torch.arange(length).expand(rows, -1)
    block = network.block(cache, positions, positions, None, cache.capacity)
    trunk_output = network.trunk(tokens, cache, block)
    trunk_output = network.fill_heads(trunk_output, network.num_heads, cache, block)
    hidden = network.heads(trunk_output, 1, network.num_heads, cache, block)
    parts = hidden.split(_LOGIT_ROWS, dim=1)
    best = torch.cat([network.head_logits(part, 1).argmax(-1) for part in parts], dim=1)
    shape = (network.num_heads, rows, length)
    later = torch.stack(
        [best[0].view(rows, length).roll(-ahead, dims=1) for ahead in range(network.num_heads)]
    ).flatten(1)
    ranks = [
        _ranks(network.head_logits(part, 1), wanted)
        for part, wanted in zip(parts, later.split(_LOGIT_ROWS, dim=1), strict=True)
    ]
    return best.view(shape).transpose(1, 2), torch.cat(ranks, dim=1).view(shape).transpose(1, 2)


def _ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """How many logits `[n, N, V]` are above those of tokens `[n, N]`."""
    return (logits > logits.gather(-1, tokens.unsqueeze(-1))).sum(-1)
