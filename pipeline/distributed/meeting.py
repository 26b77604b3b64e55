"""How the ranks of a job meet: all in one store first, so that one that is missing has a name."""

import logging
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from model.errors import ConfigError
from pipeline.distributed.identity import Identity
from pipeline.distributed.launch import Launch
from pipeline.distributed.rendezvous import RankInfo, ranks_per_node, rendezvous, step_nodes

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_REMIND_S = 30.0
_COUNT, _VERDICT, _IS_LOST, _IDENTITY = "count", "verdict", "is lost", "identity"


class MissingRankError(ConfigError):
    """A rank has ended, or has not come: the same job may well do better on another node."""


def start_process_group(
    info: RankInfo,
    device: torch.device,
    timeout_s: float,
    launch: Launch,
    identity: Identity,
) -> None:
    """Join the job's process group: NCCL on GPUs, gloo on CPUs.

    Args:
        info: this rank's position.
        device: where it computes.
        timeout_s: after this a collective, or the meeting itself, that is not complete fails.
        launch: what this host shows of the other ranks.
        identity: what this rank runs.

    Raises:
        ConfigError: the rendezvous failed (port taken, main node not reached, a rank missing), or
            a rank runs something else than rank 0.
    """
    address, port = rendezvous(os.environ)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
    # Nothing but the backend's name: a device_id would make NCCL put all transfers of a group on
    # one communicator, in one queue, and stages that send to each other would wait forever.
    backend = "nccl" if device.type == "cuda" else "gloo"
    store: Any
    if info.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
    else:
        store = Meeting(info, launch, timeout_s, identity).hold(address, port)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _refusal(info, address, port, str(error).splitlines()[0]) from error


class Meeting:
    """Where the ranks announce themselves and wait for each other, before the process group.

    Args:
        info: this rank's position.
        launch: what this host shows of the other ranks.
        timeout_s: how long to wait for all ranks.
        identity: what this rank runs.
    """

    def __init__(
        self, info: RankInfo, launch: Launch, timeout_s: float, identity: Identity
    ) -> None:
        self._info = info
        self._launch = launch
        self._timeout_s = timeout_s
        self._identity = identity
        self._begun_s = time.monotonic()
        self._remind_s = _REMIND_S
        agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts_store = info.rank == 0 and not agent_hosts_store

    def hold(self, address: str, port: str) -> Any:  # dist.Store, for which torch has no types
        """Meet in the store at `address`:`port`; returns it when every rank has come.

        The store lives in torchrun's agent, or else in rank 0.

        Raises:
            ConfigError: the store cannot be made or reached, or a rank is missing.
        """
        if not self._hosts_store:
            self._wait_for_store(address, port)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address,
                int(port),
                self._info.world_size,
                is_master=self._hosts_store,
                timeout=timedelta(seconds=self._timeout_s),
                wait_for_workers=False,
                multi_tenant=self._hosts_store,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            reason = str(error).splitlines()[0]
            raise _refusal(self._info, address, port, reason) from error
        # A worker group that torchrun starts again meets in the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"headway/meeting/{attempt}"
        try:
            self._wait_for_ranks(dist.PrefixStore(prefix, store))  # type: ignore[attr-defined]
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise MissingRankError(_gone(self._who_closed_the_store(address, port))) from error
        self._launch.met()
        return store

    def _who_closed_the_store(self, address: str, port: str) -> str:
        """Why a store that was there is not any more; this host's process table may tell."""
        for _ in range(20):
            if (ended := self._launch.ended()) is not None:
                return ended
            time.sleep(_POLL_S)
        return f"rank 0 or its launcher, where the ranks meet ({address}:{port}), has ended"

    def _wait_for_store(self, address: str, port: str) -> None:
        """Until something listens there; the store's own wait would end for no other reason."""
        while True:
            try:
                socket.create_connection((address, int(port)), timeout=5).close()
                return
            except OSError as error:
                reason = str(error)
            ended = self._launch.ended() or self._launch.never_here([0])
            if ended is not None:
                raise MissingRankError(_gone(ended))
            if self._waited_s() > self._timeout_s:
                raise _refusal(self._info, address, port, reason)
            if self._info.local_rank == 0:
                self._remind(f"{address}:{port}, where the ranks meet ({reason})")
            time.sleep(_POLL_S)

    def _wait_for_ranks(self, store: Any) -> None:
        # Two questions a round, however many ranks there are: hundreds ask one store.
        if self._info.rank == 0:
            store.set(_IDENTITY, self._identity.to_text())
        store.set(str(self._info.rank), self._identity.host)
        compared = False
        try:
            while store.add(_COUNT, 0) < self._info.world_size:
                if store.check([_VERDICT]):
                    kind = MissingRankError if store.check([_IS_LOST]) else ConfigError
                    raise kind(store.get(_VERDICT).decode())
                if not compared and store.check([_IDENTITY]):
                    self._compare(store.get(_IDENTITY).decode())
                    compared = True
                    store.add(_COUNT, 1)  # only now: whoever is counted may go on with the others
                    continue
                self._check_others(store)
                time.sleep(_POLL_S)
        except ConfigError as error:
            if isinstance(error, MissingRankError):
                store.set(_IS_LOST, "yes")
            store.set(_VERDICT, str(error))
            if self._hosts_store:
                time.sleep(5 * _POLL_S)  # for the others to read it: the store ends with this rank
            raise

    def _compare(self, main: str) -> None:
        """Refuse this rank if it runs something else than rank 0 does."""
        name = f"rank {self._info.rank}/{self._info.world_size}"
        if problem := self._identity.problem(name, Identity.from_text(main)):
            raise ConfigError(problem)

    def _check_others(self, store: Any) -> None:
        """Fail when a rank has ended here, or the time is over; say now and then who is missing."""
        ended = self._launch.ended()
        is_due = self._waited_s() > min(self._remind_s, self._timeout_s)
        if ended is None and not is_due:
            return
        missing = [r for r in range(self._info.world_size) if not store.check([str(r)])]
        ended = ended or self._launch.never_here(missing)
        if ended is not None:
            raise MissingRankError(_gone(ended))
        if not missing:
            return  # the last one came meanwhile
        names = self._names(store, missing)
        if self._waited_s() > self._timeout_s:
            raise MissingRankError(
                f"{names} did not join the job within train.timeout_s={self._timeout_s:g}; look "
                "there for what became of it: every rank must start the same command, with the "
                "same MASTER_ADDR and MASTER_PORT"
            )
        self._remind(names)

    def _remind(self, awaited: str) -> None:
        if self._waited_s() > self._remind_s:
            self._remind_s += _REMIND_S
            if self._info.local_rank == 0:
                logger.warning("still waiting for %s, after %.0f s", awaited, self._waited_s())

    def _waited_s(self) -> float:
        return time.monotonic() - self._begun_s

    def _names(self, store: Any, missing: list[int]) -> str:
        """The ranks that are missing, each with its host where that is known."""
        shown = [f"rank {rank}{self._host(store, rank)}" for rank in missing[:8]]
        more = len(missing) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")

    def _host(self, store: Any, rank: int) -> str:
        """Where a rank that is missing must be: beside the others of its node."""
        if self._launch.is_of_one_host:
            return f" on {socket.gethostname()}"
        size = ranks_per_node(os.environ)
        if size is None:
            return ""
        node = rank // size
        for other in range(node * size, min((node + 1) * size, self._info.world_size)):
            if store.check([str(other)]):
                return f" on {store.get(str(other)).decode()}"
        names = step_nodes(os.environ)
        return f" on {names[node]}" if node < len(names) else f" on node {node} of the job"


def _gone(ended: str) -> str:
    return f"{ended}; its own output says why, unless it was killed: start the job again"


def _refusal(info: RankInfo, address: str, port: str, reason: str) -> ConfigError:
    return ConfigError(
        f"MASTER_ADDR={address} MASTER_PORT={port}: rank {info.rank}/{info.world_size} could "
        f"not join the job ({reason}); the port must be free on the first node and reachable "
        "from all others: choose another MASTER_PORT, or check the address"
    )


def is_communication_error(error: Exception) -> bool:
    """Whether a collective broke, as it does when another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out", "socket")
    )
