"""Logits of an export against those of its checkpoint, one layer in memory at a time.

Both sides run the same few tokens: training's layers with the checkpoint's weights, rounded to the
type of the export, and the layers of `transformers` with the tensors of the written files. Weights
of one layer, or some rows of the unembedding, are read, used and dropped, so that a model of any
size is compared within the memory of one of its layers.

Legend: n heads, B batch, S sequence, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from model.config import ModelConfig
from model.hugging_face.folder import ALL_HEADS_INDEX_NAME, ExportDescription
from model.hugging_face.loading import DTYPES
from model.hugging_face.modeling_headway import HeadwayConfig
from model.hugging_face.names import EXTRA_HEADS, EXTRA_LM_HEADS, LINEAR_HEAD_1, head_prefixes
from model.hugging_face.stored_tensors import StoredTensors
from model.layers import Layer, LayerContext, transformer_config
from model.operations.rotary import RotaryTable
from model.structure.parameter_shapes import LINEAR, head_layer_names, layer_shapes, own_unembedding
from model.structure.process_groups import ensure_single_process
from pipeline.checkpoint.sharded_tensors import StateFiles
from pipeline.exporting.whole_model import Parity, parity_tokens

UNEMBEDDING_BLOCK_BYTES = 1 << 26


class _Side(Protocol):
    def head_outputs(self, tokens: Tensor) -> Tensor:
        """`[n, B, S, H]` of all heads, after the final norm."""
        ...

    def unembedding(self, head: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of what a head uses, in fp32."""
        ...


def compare_layers(folder: Path, description: ExportDescription, files: StateFiles) -> Parity:
    """Compare an export with the checkpoint it was made from, in fp32, layer by layer.

    Args:
        folder: the export.
        description: what it is of.
        files: the checkpoint's weights.
    """
    differences = torch.zeros(description.model.future_tokens)
    largest = torch.zeros(())
    for expected, found in logit_blocks(folder, description, files):
        # torch.maximum, unlike Python's max, keeps what is not a number
        differences = torch.maximum(differences, (found - expected).abs().amax((1, 2, 3)))
        largest = torch.maximum(largest, expected.abs().max())
    heads = tuple(differences.tolist())
    return Parity("layer by layer", heads[0], heads, (), float(largest))


def logit_blocks(
    folder: Path,
    description: ExportDescription,
    files: StateFiles,
    *,
    block_bytes: int = UNEMBEDDING_BLOCK_BYTES,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of the checkpoint and of the export, for one block of the vocabulary after another.

    Args:
        folder: the export.
        description: what it is of.
        files: the checkpoint's weights.
        block_bytes: of the unembedding in fp32, held at a time.

    Yields:
        Two tensors `[n, B, S, tokens of the block]`.
    """
    config, tokens = description.model, parity_tokens(description)
    sides: tuple[_Side, _Side] = _Trained(files, description), _Written(folder, description)
    with torch.no_grad():
        outputs = [side.head_outputs(tokens) for side in sides]
    rows = max(1, block_bytes // (4 * config.hidden_size))
    heads = range(1, config.future_tokens + 1)
    for start in range(0, config.vocab_size, rows):
        stop = min(start + rows, config.vocab_size)
        expected, found = (
            _logits(side, output, heads, start, stop, shared=config.lm_head == "shared")
            for side, output in zip(sides, outputs, strict=True)
        )
        yield expected, found


def _logits(
    side: _Side, outputs: Tensor, heads: range, start: int, stop: int, *, shared: bool
) -> Tensor:
    """`[n, B, S, tokens of the block]`."""
    if shared:
        return outputs @ side.unembedding(1, start, stop).t()
    each = [outputs[head - 1] @ side.unembedding(head, start, stop).t() for head in heads]
    return torch.stack(each)


def heads_by_number(
    config: ModelConfig, hidden: Tensor, run: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """What each head gives, head 1 first.

    Args:
        config: sizes.
        hidden: the trunk's output.
        run: one head on what it reads.
    """
    outputs = {}
    for head in config.head_order:
        outputs[head] = run(head, hidden)
        if config.chain:
            hidden = outputs[head]
    return [outputs[head] for head in sorted(outputs)]


class _Trained:
    """Training's layers with the checkpoint's weights, as the export rounds them."""

    def __init__(self, files: StateFiles, description: ExportDescription) -> None:
        ensure_single_process()
        self._files = files
        self._config = config = description.model
        self._dtype = DTYPES[description.dtype]
        self._rotary = RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling)
        with torch.device("meta"):  # the weights of each layer are handed to it
            self._layer = Layer(transformer_config(config), 1, checkpointing="none").eval()

    def head_outputs(self, tokens: Tensor) -> Tensor:
        """See `_Side`; in between `[S, B, H]`."""
        rotation = self._rotary.sequence(tokens.shape[1], tokens.device, torch.float32)
        context = LayerContext(rotation)
        ids, places = tokens.t().unique(return_inverse=True)
        rows = [self._rows("trunk.embedding.weight", row, row + 1) for row in ids.tolist()]
        hidden = torch.cat(rows)[places]
        for index in range(self._config.trunk_layers):
            hidden = self._run(f"trunk.layers.{index}.block", hidden, context)
        outputs = heads_by_number(self._config, hidden, functools.partial(self._head, context))
        norm = self._whole("heads.readout.norm_weight")
        stacked = torch.stack(outputs).transpose(1, 2)
        return F.rms_norm(stacked, norm.shape, norm, self._config.norm_eps)

    def unembedding(self, head: int, start: int, stop: int) -> Tensor:
        """See `_Side`."""
        replicated = self._config.lm_head == "replicated" and head > 1
        name = own_unembedding(head) if replicated else "heads.readout.weight"
        return self._rows(name, start, stop)

    def _head(self, context: LayerContext, head: int, hidden: Tensor) -> Tensor:
        if self._config.head_kind == "linear":
            return F.linear(hidden, self._whole(f"heads.layers.{head}.{LINEAR}"))
        for prefix in head_layer_names(self._config, head):
            hidden = self._run(prefix, hidden, context)
        return hidden

    def _run(self, prefix: str, hidden: Tensor, context: LayerContext) -> Tensor:
        names = list(layer_shapes(self._config))
        weights = {f"block.{name}": self._whole(f"{prefix}.{name}") for name in names}
        output: Tensor = functional_call(self._layer, weights, (hidden, context))
        return output

    def _whole(self, name: str) -> Tensor:
        return self._files.whole("weight", name).to(self._dtype).float()

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._files.rows("weight", name, start, stop).to(self._dtype).float()


class _Written:
    """The layers of `transformers` with the tensors of the export's files."""

    def __init__(self, folder: Path, description: ExportDescription) -> None:
        self._tensors = StoredTensors(folder, ALL_HEADS_INDEX_NAME)
        self._model = description.model
        # Of a model that is no Llama.
        own = self._model.head_kind == "linear" or self._model.memory is not None
        self._config: Any = (HeadwayConfig if own else LlamaConfig).from_pretrained(folder)
        self._config._attn_implementation = "sdpa"  # causal where it is given no mask
        self._rotary = LlamaRotaryEmbedding(self._config)
        with torch.device("meta"):
            last = self._config.num_hidden_layers - 1
            self._layer = LlamaDecoderLayer(self._config, last).eval()
            self._norm = LlamaRMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        self._names = list(dict(self._layer.named_parameters()))

    def head_outputs(self, tokens: Tensor) -> Tensor:
        """See `_Side`; in between `[B, S, H]`."""
        ids, places = tokens.unique(return_inverse=True)
        name = "model.embed_tokens.weight"
        hidden = torch.cat([self._tensors.rows(name, row, row + 1) for row in ids.tolist()])
        hidden = hidden.float()[places]
        for index in range(self._model.trunk_layers):
            hidden = self._run(f"model.layers.{index}", hidden)
        outputs = heads_by_number(self._model, hidden, self._head)
        norm = {"weight": self._tensors.whole("model.norm.weight").float()}
        normed: Tensor = functional_call(self._norm, norm, (torch.stack(outputs),))
        return normed

    def unembedding(self, head: int, start: int, stop: int) -> Tensor:
        """See `_Side`."""
        replicated = self._model.lm_head == "replicated" and head > 1
        name = f"{EXTRA_LM_HEADS}.{head}.weight" if replicated else "lm_head.weight"
        return self._tensors.rows(name, start, stop).float()

    def _head(self, head: int, hidden: Tensor) -> Tensor:
        if self._model.head_kind == "linear":
            name = LINEAR_HEAD_1 if head == 1 else f"{EXTRA_HEADS}.{head}.weight"
            return F.linear(hidden, self._tensors.whole(name).float())
        for prefix in head_prefixes(head, self._model):
            hidden = self._run(prefix, hidden)
        return hidden

    def _run(self, prefix: str, hidden: Tensor) -> Tensor:
        weights = {name: self._tensors.whole(f"{prefix}.{name}").float() for name in self._names}
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        named = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": self._rotary(hidden, positions),
        }
        output = functional_call(self._layer, weights, (hidden,), named)
        return output[0] if isinstance(output, tuple) else output
