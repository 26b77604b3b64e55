"""GPUs that plans know, from their data sheets, and the shares of these figures that runs reach."""

from typing import NamedTuple

from pipeline.planning.layout import Machine

# What a 7B layer and collectives reach, not what a data sheet says; a tenth of the memory is left
# to NCCL, CUDA and fragments. Assumed but for the H100's layers: 1B reached 41 to 44 % on one, and
# its memory was within 1 % of the plan's (benchmarks/README.md, "Everything on one GPU").
FILLED = 0.9
REACHED_LINKS, REACHED_NETWORK, REACHED_MEMORY_BANDWIDTH = 0.78, 0.8, 0.8
_LATENCY_S = 4e-6
_ADAM_BYTES = 40  # that a parameter's update reads and writes: three fp32 states, gradient, weight


class Gpu(NamedTuple):
    """One kind of GPU in a node of 8 with NVLink.

    Attributes:
        memory_bytes: all of it.
        bf16_flops: FLOP/s of dense bf16 products.
        fp32_flops: FLOP/s of fp32 products.
        reached: share of FLOP/s that layers reach.
        memory_bandwidth: bytes/s of its own memory.
        link_bandwidth: bytes/s of its links within a node, in one direction.
        network_gbit: Gbit/s of the network that its reference system gives each GPU.
    """

    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    reached: float
    memory_bandwidth: float
    link_bandwidth: float
    network_gbit: float


GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet (June 2021), SXM; DGX A100: 8 HDR adapters of 200 Gb/s.
    "a100-40g": Gpu(40e9, 312e12, 19.5e12, 0.5, 1.555e12, 300e9, 200),
    "a100-80g": Gpu(80e9, 312e12, 19.5e12, 0.5, 2.039e12, 300e9, 200),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM (bf16 half of the figure with sparsity);
    # DGX H100: 8 ConnectX-7 of 400 Gb/s.
    "h100-80g": Gpu(80e9, 989e12, 67e12, 0.4, 3.35e12, 450e9, 400),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM; DGX H200 as DGX H100.
    "h200-141g": Gpu(141e9, 989e12, 67e12, 0.4, 4.8e12, 450e9, 400),
    # NVIDIA HGX B200, one of eight (dense bf16 half of the figure with sparsity); DGX B200: 8
    # ConnectX-7 of 400 Gb/s.
    "b200-180g": Gpu(180e9, 2250e12, 75e12, 0.4, 7.7e12, 900e9, 400),
}


def machine_of(
    name: str,
    *,
    gpus_per_node: int = 8,
    network_gbit: float | None = None,
    element_bytes: int = 2,
) -> Machine:
    """The machine of nodes with such GPUs.

    Args:
        name: a key of `GPUS`.
        gpus_per_node: GPUs of a node.
        network_gbit: Gbit/s of the network for each GPU; None = as in the reference system.
        element_bytes: of weights and activations; 2 = bf16, 4 = fp32.
    """
    gpu = GPUS[name]
    flops = gpu.reached * (gpu.bf16_flops if element_bytes == 2 else gpu.fp32_flops)
    network = gpu.network_gbit if network_gbit is None else network_gbit
    return Machine(
        name=name,
        ranks_per_node=gpus_per_node,
        flops=flops,
        lm_head_flops=flops,
        intra_bandwidth=REACHED_LINKS * gpu.link_bandwidth,
        inter_bandwidth=REACHED_NETWORK * network * 1e9 / 8,
        latency_s=_LATENCY_S,
        optimizer_s=_ADAM_BYTES / (REACHED_MEMORY_BANDWIDTH * gpu.memory_bandwidth),
        memory_bytes=FILLED * gpu.memory_bytes,
        element_bytes=element_bytes,
    )
