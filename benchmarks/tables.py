"""Tables of benchmarks: the machine they are of, and their place in README.md."""

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "deepspeed", "megatron-core")


def machine_line(device: str = "cpu", libraries: Sequence[str] = LIBRARIES) -> str:
    """Hardware, versions and date of what is measured now, in one sentence."""
    return f"{hardware(device)}; {versions(libraries)}; {date.today().isoformat()}."


def versions(libraries: Sequence[str] = LIBRARIES) -> str:
    """Of libraries, by name."""
    return ", ".join(f"{name} {version(name)}" for name in libraries)


def hardware(device: str) -> str:
    """The device's name."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    cores = len(os.sched_getaffinity(0))
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def replace_section(readme: Path, name: str, section: str) -> None:
    """Put a section between its markers, `<!-- NAME begin -->` and `<!-- NAME end -->`."""
    begin, end = (f"<!-- {name} {word} -->" for word in ("begin", "end"))
    text = readme.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    assert found_begin, f"{readme} has no line {begin}"
    assert found_end, f"{readme} has no line {end}"
    partial = readme.with_name(f"{readme.name}.partial")  # a full disk leaves what was there
    partial.write_text(f"{before}{begin}\n{section}\n{end}{after}", encoding="utf-8")
    partial.replace(readme)
