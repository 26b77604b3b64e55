"""Which kernels a model computes with on this device; chosen once, before training."""

import logging

import torch

from model.language_model import MultiTokenModel
from model.loss import product_adds_in_float32
from model.operations.attention_backend import BackendChoice
from model.operations.compiled import check_compiler
from model.operations.rms_norm import RMSNorm
from model.operations.swiglu import SwiGLU

logger = logging.getLogger(__name__)


def choose_kernels(
    model: MultiTokenModel,
    attention: BackendChoice,
    device: torch.device,
    *,
    compile_elementwise: bool = False,
) -> None:
    """Choose, try what has to be tried, and say what came out.

    Args:
        model: this rank's part of the model.
        attention: what the run asks for.
        device: where it runs.
        compile_elementwise: let torch.compile make the kernels of norms and activations.

    Raises:
        ConfigError: the attention asked for cannot be used here, or nothing can be compiled.
    """
    if compile_elementwise:
        check_compiler(device)
        for module in model.modules():
            if isinstance(module, RMSNorm | SwiGLU):
                module.compile_kernel()
    backend = model.choose_attention(attention, device)
    if backend is None:
        logger.info("attention     by torch's own choice, as on every CPU")
        return
    logger.info("attention     by %s (train.attention=%s)", backend, attention)
    if model.dtype == torch.bfloat16 and not product_adds_in_float32(device):
        logger.info(
            "unembedding   its gradient is added up by a product and a sum: this torch (%s) has no "
            "product that does both",
            torch.__version__,
        )
