"""What the fork server loads once, so that ranks start with it."""

import gc
import logging
import os
import warnings

warnings.filterwarnings("ignore")
os.environ["DS_ACCELERATOR"] = "cpu"  # ranks of tests compute on the CPU, GPUs or not
# Else DeepSpeed starts `numactl` before each reduction of ZeRO-3, to count what it does not use.
os.environ["LOCAL_SIZE"] = "1"

import deepspeed  # noqa: E402

# DeepSpeed and torch import these when the first engine is built or trains.
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.ops.op_builder.all_ops  # noqa: E402
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401, E402
import torch._subclasses.schema_check_mode  # noqa: F401, E402
import transformers.models.llama.modeling_llama  # noqa: F401, E402

import pipeline.export  # noqa: E402
import pipeline.job  # noqa: E402
import pipeline.train  # noqa: F401, E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# What is loaded never becomes garbage. A rank that looked at it would spend a third of a second on
# each full collection, most of it on copies of pages that it shares with the server until then.
gc.collect()
gc.freeze()
