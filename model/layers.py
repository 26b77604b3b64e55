"""Transformer layers: megatron-core's, by layer spec, with parts of ours where they pay.

Legend: S sequence, B batch, H hidden, D head dimension.
"""

import importlib.util
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.operations.attention import CoreAttention
from model.operations.documents import AttentionMask
from model.operations.rms_norm import RMSNorm
from model.operations.rotary import Rotation
from model.operations.self_attention import SelfAttention
from model.operations.swiglu import SwiGLU

Checkpointing = Literal["none", "full", "selective"]


class LayerContext(NamedTuple):
    """What every layer needs besides its input, made once for a forward.

    Attributes:
        rotary: of the positions.
        mask: which keys a query sees; None: all up to its own position.
    """

    rotary: Rotation
    mask: AttentionMask | None = None


def transformer_config(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, transformer_engine: bool = False
) -> TransformerConfig:
    """Megatron's configuration for a Llama-style layer on CPU or GPU.

    Weights are made on the CPU and left uninitialized (`model.structure.initialization` fills
    them). The fused kernels of megatron need apex or CUDA and are off. `use_te_activation_func`
    only says that the layer spec names the activation.
    """
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.attention_heads,
        num_query_groups=config.kv_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        use_te_activation_func=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        transformer_impl="transformer_engine" if transformer_engine else "local",
    )


def layer_spec(config: TransformerConfig) -> Any:
    """The layer's spec: Transformer Engine's modules if the configuration says so, else megatron's.

    Norms, activation, and all of attention but its products are those of `model.operations`. Both
    kinds of modules give parameters of the same names and shapes, so checkpoints move between them.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    spec.submodules.self_attention.module = SelfAttention
    attention.core_attention = ModuleSpec(module=CoreAttention)
    mlp.activation_func = SwiGLU
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions import transformer_engine as te

        spec.submodules.input_layernorm = te.TENorm
        spec.submodules.pre_mlp_layernorm = te.TENorm
        attention.linear_qkv = te.TEColumnParallelLinear
        attention.linear_proj = te.TERowParallelLinear
        mlp.linear_fc1 = te.TEColumnParallelLinear
        mlp.linear_fc2 = te.TERowParallelLinear
    return spec


def transformer_engine_available() -> bool:
    """Whether layers can be built from Transformer Engine: it is installed and there is a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class Layer(nn.Module):
    """One transformer layer, with or without recomputation of its activations in backward.

    Args:
        config: megatron's configuration.
        number: the layer's number, from 1.
        checkpointing: `full` keeps only the layer's input and runs the layer again in backward;
            `selective` runs only its core attention again.
    """

    def __init__(
        self, config: TransformerConfig, number: int, *, checkpointing: Checkpointing
    ) -> None:
        super().__init__()
        self.recompute = checkpointing == "full"
        self.block = build_module(layer_spec(config), config=config, layer_number=number)
        self.block.self_attention.core_attention.recompute = checkpointing == "selective"

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """Run the layer.

        Args:
            hidden: `[S, B, H]`.
            context: positions and mask of the sequences.

        Returns:
            `[S, B, H]`.
        """
        trained = hidden.requires_grad or any(p.requires_grad for p in self.parameters())
        if self.recompute and self.training and trained and torch.is_grad_enabled():
            # Reentrant: under ZeRO-3 the weights kept for backward are freed in between, and
            # only a whole second forward, with its fetches, brings them back. It runs only if
            # an input requires a gradient. A frozen trunk's output does not, so a head asks for it.
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            # Without dropout there is no random state to keep.
            return checkpoint(
                self._run, hidden, context, use_reentrant=True, preserve_rng_state=False
            )
        return self._run(hidden, context)

    def _run(self, hidden: Tensor, context: LayerContext) -> Tensor:
        output, _ = self.block(
            hidden_states=hidden, attention_mask=context.mask, rotary_pos_emb=context.rotary
        )
        return output
