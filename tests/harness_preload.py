"""What the fork server loads once, so that ranks start with it."""

import logging
import warnings

warnings.filterwarnings("ignore")

import deepspeed  # noqa: F401, E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401, E402

import pipeline.engine  # noqa: F401, E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
