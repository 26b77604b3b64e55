"""What CUDA's libraries read from the environment when they start; afterwards they do not look.

Values that the user has set stay.
"""

from collections.abc import MutableMapping


def prepare_cuda(
    environment: MutableMapping[str, str], *, stages: int, deterministic: bool
) -> None:
    """Set the variables of a run; before anything asks whether there is a GPU.

    Args:
        environment: of this process.
        stages: pipeline stages.
        deterministic: `train.deterministic`.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        # Under memory pressure the allocator would otherwise free blocks, which waits for the GPU,
        # and keep holes that no later tensor fits into.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if stages > 1:
        # A kernel that is loaded at its first launch waits for the whole GPU, receives that are
        # posted ahead included.
        environment.setdefault("CUDA_MODULE_LOADING", "EAGER")
    if deterministic:
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
