"""Checks of the ranks' machines: devices, versions, code and configuration, clocks."""

import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from pipeline.diagnosis.check import Check, Context, Outcome, ranks_text
from pipeline.distributed.identity import Identity

_SHOWN_VERSIONS = ("Python", "torch", "deepspeed", "megatron-core")
_LEAST_FREE = 0.9  # of a GPU's memory
# Times in logs and metrics of one run should tell what was first.
_MOST_SKEW_S = 2.0
_CLOCK_LOOKS = 5


def _device(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = {"host": socket.gethostname(), "kind": context.device.type}
    if context.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(context.device)
        name = torch.cuda.get_device_name(context.device)
        uuid = str(getattr(torch.cuda.get_device_properties(context.device), "uuid", ""))
        return found | {"name": name, "free": free, "total": total, "uuid": uuid}
    cores = len(os.sched_getaffinity(0))
    return found | {"name": f"cpu, {cores} cores", "free": 1, "total": 1, "uuid": ""}


def _judge_devices(context: Context, ranks: list[dict[str, Any]]) -> Outcome:
    problems = []
    others = [rank for rank, found in enumerate(ranks) if found["name"] != ranks[0]["name"]]
    if others and ranks[0]["kind"] == "cuda":
        problems.append(
            f"{ranks_text(others)} have {ranks[others[0]]['name']}, rank 0 has "
            f"{ranks[0]['name']}; every step waits for the slowest: ask for nodes of one kind"
        )
    for rank, found in enumerate(ranks):
        if found["free"] < _LEAST_FREE * found["total"]:
            problems.append(
                f"rank {rank} on {found['host']} has {found['free'] / 2**30:.1f} of "
                f"{found['total'] / 2**30:.1f} GiB of GPU memory free; end what else runs there"
            )
    seen: dict[tuple[str, str], int] = {}
    for rank, found in enumerate(ranks):
        place = (found["host"], found["uuid"])
        if found["uuid"] and place in seen:
            problems.append(
                f"ranks {seen[place]} and {rank} share one GPU of {found['host']}; start as many "
                "ranks on a node as it has GPUs"
            )
        seen.setdefault(place, rank)
    hosts = len({found["host"] for found in ranks})
    return Outcome(f"{len(ranks)} x {ranks[0]['name']} on {hosts} hosts", problems)


def _versions(context: Context) -> Identity:
    return Identity.of_this_process(
        context.config.model_dump(mode="json"),
        device=context.device.type,
        precision=context.precision,
    )


def _judge_versions(context: Context, ranks: list[Identity]) -> Outcome:
    main = ranks[0]
    found = [identity.problem(f"rank {rank}", main) for rank, identity in enumerate(ranks)]
    shown = ", ".join(f"{name} {main.code[name]}" for name in _SHOWN_VERSIONS)
    sources = sum(name.endswith(".py") for name in main.code)
    return Outcome(
        f"{shown}, {sources} source files and the configuration, of {len(ranks)} ranks",
        [problem for problem in found if problem],
    )


def _clock(context: Context) -> list[float]:
    """The time on this rank, each time right after all ranks have met."""
    times = []
    for _ in range(_CLOCK_LOOKS):
        if dist.is_initialized():
            dist.barrier()
        times.append(time.time())
    return times


def _judge_clocks(context: Context, ranks: list[list[float]]) -> Outcome:
    looks = [[times[look] for times in ranks] for look in range(_CLOCK_LOOKS)]
    best = min(looks, key=lambda times: max(times) - min(times))  # least of it is waiting
    skew_s = max(best) - min(best)
    problems = []
    if skew_s > _MOST_SKEW_S:
        ahead, behind = best.index(max(best)), best.index(min(best))
        problems.append(
            f"the clock of rank {ahead} is {skew_s:.1f} s ahead of that of rank {behind}; let the "
            "nodes take their time from one server (chrony, ntp)"
        )
    return Outcome(f"at most {skew_s * 1000:.1f} ms apart, waiting included", problems)


def _judge_ports(context: Context, ranks: list[None]) -> Outcome:
    return Outcome(context.meeting)


CHECKS = (
    Check("ports", lambda context: None, _judge_ports),
    Check("devices", _device, _judge_devices),
    Check("versions", _versions, _judge_versions),
    Check("clocks", _clock, _judge_clocks),
)
