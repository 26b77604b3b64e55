"""Which kernels a model computes with on this device; chosen once, before training."""

import logging
from typing import Literal

import torch

from model.language_model import MultiTokenModel
from model.loss import product_adds_in_float32
from model.operations.attention_backend import BackendChoice
from model.operations.compiled import can_compile, check_compiler

logger = logging.getLogger(__name__)


def choose_kernels(
    model: MultiTokenModel,
    attention: BackendChoice,
    device: torch.device,
    *,
    compile_elementwise: bool | Literal["auto"] = False,
) -> None:
    """Choose, try what has to be tried, and say what came out.

    Args:
        model: this rank's part of the model.
        attention: what the run asks for.
        device: where it runs.
        compile_elementwise: let torch.compile make the kernels of norms, rotation, activation and
            loss; auto = on a GPU where it can.

    Raises:
        ConfigError: the attention asked for cannot be used here, or nothing can be compiled.
    """
    if compile_elementwise == "auto":
        compile_elementwise = device.type == "cuda" and can_compile(device)
    elif compile_elementwise:
        check_compiler(device)
    if compile_elementwise:
        model.compile_kernels()
        logger.info("kernels       of norms, rotation, activation and loss by torch.compile")
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
