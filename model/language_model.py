"""The whole model: trunk, heads, and the positions and mask they share.

Legend: B batch, S sequence, H hidden, V vocabulary, V' this rank's share of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from model.config import ModelConfig
from model.heads import Heads
from model.layers import Checkpointing, LayerContext, transformer_config
from model.loss import VocabularyShard
from model.memory.adapted_layer import add_adapters
from model.memory.prompts import MemoryParameters
from model.memory.segments import split_at_segments
from model.memory.unrolling import Window, unroll
from model.operations.attention import CoreAttention
from model.operations.attention_backend import (
    AttentionBackend,
    AttentionShape,
    BackendChoice,
    can_use_on,
    choose_backend,
)
from model.operations.documents import (
    attention_mask,
    bias_within,
    positions_within,
    visible_within,
)
from model.operations.rms_norm import RMSNorm
from model.operations.rotary import RotaryTable
from model.operations.self_attention import SelfAttention
from model.operations.swiglu import SwiGLU
from model.structure.initialization import initial_weight
from model.structure.parameter_shapes import layer_shapes
from model.structure.part import ModelPart
from model.structure.sharding import local_shapes, mark_split_parameters
from model.trunk import Trunk


class MultiTokenModel(nn.Module):
    """A Llama-style model that predicts n future tokens (Gloeckle et al. 2024).

    L layers in all: L - n in the trunk, one in each of the n heads (see `ModelConfig` for other
    kinds of heads). Each tensor-parallel rank
    builds its own part; megatron's process groups must exist.

    Args:
        config: sizes.
        dtype: of the weights.
        activation_checkpointing: `none`; `full` keeps only each layer's input; `selective`
            recomputes the core attention alone.
        transformer_engine: build the layers from Transformer Engine's modules (GPU only).
        part: what to hold of the model, in a run with pipeline stages; None = all of it.

    Attributes:
        compiles_kernels: whether torch.compile makes kernels for layers, loss and gradient sums.
    """

    compiles_kernels = False

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        activation_checkpointing: Checkpointing = "none",
        transformer_engine: bool = False,
        part: ModelPart | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.part = part or ModelPart.whole(config)
        layer_config = transformer_config(
            config, dtype=dtype, transformer_engine=transformer_engine
        )
        self.trunk = Trunk(
            layer_config,
            config.vocab_size,
            self.part.trunk_layers,
            checkpointing=activation_checkpointing,
        )
        self.heads = Heads(
            config, layer_config, self.part.heads, checkpointing=activation_checkpointing
        )
        if config.memory is not None:
            self.memory = MemoryParameters(config.memory, config.hidden_size, dtype)
            if config.memory.adapter_rank:
                shapes = local_shapes(
                    layer_shapes(config), parallel_state.get_tensor_model_parallel_world_size()
                )
                for layer in self.trunk.layers.values():
                    add_adapters(layer.get_submodule("block"), config.memory, shapes, dtype)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling)
        self._attentions = [m for m in self.modules() if isinstance(m, CoreAttention)]
        self.to(dtype)  # megatron makes the norms of its local layers in float32
        mark_split_parameters(self)

    @property
    def shard(self) -> VocabularyShard:
        """The rows of the unembedding that this rank holds."""
        group = parallel_state.get_tensor_model_parallel_group()
        size = parallel_state.get_tensor_model_parallel_world_size()
        return VocabularyShard.of_rank(self.config.vocab_size // size, group)

    def context(
        self, length: int, device: torch.device, documents: Tensor | None = None
    ) -> LayerContext:
        """Positions and mask of S positions, for the trunk's layers and every head's.

        Args:
            length: S.
            device: where the layers run.
            documents: `[B, S]` integers, rising along each sequence: which of its documents a token
                belongs to. Positions then count from the start of each document, and none sees
                another document. None: each sequence is one text.
        """
        if documents is None:
            return LayerContext(self.rotary.sequence(length, device, self.dtype))
        documents = documents.to(device)
        assert documents.shape[1] == length, (documents.shape, length)
        return LayerContext(
            self.rotary.rotation(positions_within(documents), self.dtype),
            attention_mask(documents, self.config.head_dim, self.dtype),
        )

    def heads_context(self, trunk_output: Tensor, documents: Tensor | None = None) -> LayerContext:
        """Positions and mask for the heads over z `[S, B, H]`.

        Args:
            trunk_output: z; of a model with a memory from the beginning of a segment on.
            documents: `[B, S]` the ones with which the trunk ran, at the positions of z.
        """
        length, rows = trunk_output.shape[:2]
        if self.config.memory is not None:
            documents = split_at_segments(
                self.config.memory, rows, length, documents, trunk_output.device
            )
        return self.context(length, trunk_output.device, documents)

    def forward(
        self,
        inputs: Tensor,
        then: Callable[[Tensor], Any] | None = None,
        *,
        documents: Tensor | None = None,
        window: Window | None = None,
        memories: list[Tensor] | None = None,
    ) -> Any:
        """Run the trunk, and with `then` what follows it, inside one forward of this module.

        Args:
            inputs: `[B, S]` int64 ids; for a part that has no embedding, what the part before
                gave, `[S, B, H]`.
            then: computes what the caller needs from z.
            documents: `[B, S]` which document of its sequence a token belongs to, see `context`;
                the heads need the same ones.
            window: of a model with a memory, the segments to run; None = all.
            memories: likewise, what `model.memory.unrolling.unroll` takes; None = none so far.

        Returns:
            z `[S, B, H]` (in a part of the trunk, what its last layer gives; with a window, at the
            segments that it scores), or what `then(z)` returned.
        """
        if self.config.memory is not None:
            trunk_output = unroll(
                self,
                self.memory(),
                self.config.memory,
                inputs,
                [] if memories is None else memories,
                documents=None if documents is None else documents.to(inputs.device),
                window=window,
            )
        else:
            length = inputs.shape[1 if self.part.has_embedding else 0]
            context = self.context(length, inputs.device, documents)
            trunk_output = self.trunk(inputs, context)
        return trunk_output if then is None else then(trunk_output)

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids `[B, S]` to embeddings `[S, B, H]`."""
        return self.trunk.embed(tokens)

    def transform(self, hidden: Tensor, documents: Tensor | None) -> Tensor:
        """The trunk's layers over `[S, B, H]`; see `unroll`.

        Positions count from 0, those of a document from its first one here: what stands between
        and is of another document takes no place.
        """
        if documents is None:
            context = self.context(hidden.shape[0], hidden.device)
        else:
            positions = visible_within(documents).sum(-1).squeeze(1) - 1
            context = LayerContext(
                self.rotary.rotation(positions, self.dtype), bias_within(documents, self.dtype)
            )
        return self.trunk.transform(hidden, context)

    @torch.no_grad()
    def logits(self, hidden: Tensor, head: int = 1) -> Tensor:
        """Logits `[..., V']` of a head's outputs `[..., H]`, in the weights' dtype."""
        norm, unembedding = self.heads.lm_head()
        own = self.heads.own_unembedding(head)
        normed: Tensor = self.heads.lm_head.normalize(hidden, norm)
        return normed @ (unembedding if own is None else own).t()

    def all_logits(self, trunk_output: Tensor, context: LayerContext) -> Tensor:
        """Logits `[n, S, B, V']` of all heads, head 1 first, of a model that is held whole."""
        outputs = self.heads.outputs(trunk_output, context)
        logits = {head: self.logits(hidden, head) for head, hidden in outputs}
        return torch.stack([logits[head] for head in self.heads.numbers])

    def choose_attention(
        self, choice: BackendChoice, device: torch.device
    ) -> AttentionBackend | None:
        """Let causal attention run on one of torch's kernels.

        Args:
            choice: which one; auto = the fastest that can be used.
            device: where the model runs. On a CPU torch chooses, whatever is asked for.

        Returns:
            The kernel; None when torch chooses for itself.

        Raises:
            ConfigError: it cannot be used on this device.
        """
        if device.type != "cuda":
            return None
        size = parallel_state.get_tensor_model_parallel_world_size()
        heads, kv_heads = self.config.attention_heads // size, self.config.kv_heads // size
        shape = AttentionShape(heads, kv_heads, self.config.head_dim, self.dtype)
        backend = choose_backend(choice, shape, can_use_on(device))
        for attention in self._attentions:
            attention.backend = backend
        return backend

    def compile_kernels(self) -> None:
        """Let torch.compile make the kernels of norms, rotation, activation and loss."""
        self.compiles_kernels = True
        for module in self.modules():
            if isinstance(module, RMSNorm | SwiGLU | SelfAttention):
                module.compile_kernel()

    def initial_weight(self, name: str, local_shape: torch.Size, seed: int) -> Tensor:
        """This rank's part of a parameter's initial value, see `model.structure.initialization`."""
        # Prompts of a memory stand where embeddings do.
        embedding = name.endswith((".embedding.weight", "memory.initial", "memory.summary"))
        return initial_weight(
            name,
            local_shape,
            seed=seed,
            std=self.config.embedding_init_std if embedding else self.config.init_std,
            num_layers=self.config.layers,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        )
