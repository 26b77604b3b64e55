"""Peak arithmetic of known GPUs, for model FLOPS utilization."""

# Dense bf16 tensor-core FLOP/s from the makers' data sheets (V100: fp16, it has no bf16). The first
# entry whose words are all in the device name counts, so the particular come before the general.
_PEAK_FLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB200",), 2500e12),
    (("GB300",), 2500e12),
    (("B300",), 2250e12),
    (("B200",), 2250e12),
    (("B100",), 1750e12),
    (("GH200",), 989e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("H100", "PCIE"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H800",), 989e12),
    (("H20",), 148e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("A40",), 150e12),
    (("A30",), 165e12),
    (("A10G",), 70e12),
    (("A10",), 125e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("V100",), 125e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by the name its driver reports; None when unknown."""
    words = device_name.upper().replace("-", " ").replace("_", " ").split()
    for needed, flops in _PEAK_FLOPS:
        if all(word in words for word in needed):
            return flops
    return None
