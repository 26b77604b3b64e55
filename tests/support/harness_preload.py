"""What the fork server loads once, so that ranks start with it."""

import logging
import os
import warnings

warnings.filterwarnings("ignore")
os.environ["DS_ACCELERATOR"] = "cpu"  # ranks of tests compute on the CPU, GPUs or not

import deepspeed  # noqa: F401, E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401, E402

import pipeline.engine.engine  # noqa: F401, E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
