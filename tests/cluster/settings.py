"""What the test cluster is: its nodes, and Slurm's files for it."""

from pathlib import Path
from typing import NamedTuple


class Node(NamedTuple):
    """What a node claims to have; none of it need exist.

    Attributes:
        cpus: number of CPUs.
        gpus: number of GPUs.
    """

    cpus: int = 16
    gpus: int = 8


class Settings(NamedTuple):
    """A cluster.

    Attributes:
        nodes: node1, node2, ... in order.
        gpu_type: named in `--gpus=TYPE:N`.
        slurmd_timeout_s: silence after which the controller takes a node for down. Slurm's own
            default is 300.
        requeue_pause_s: between a job's end and its next start. Slurm's own default is 120, which
            it also takes for less than 5.
        grace_s: what preemption leaves a job of the partition `graced`.
    """

    nodes: tuple[Node, ...] = (Node(),) * 4
    gpu_type: str = "h100"
    slurmd_timeout_s: int = 5
    requeue_pause_s: int = 5
    grace_s: int = 30


def node_name(index: int) -> str:
    """The name of a node, counted from 0."""
    return f"node{index + 1}"


def slurm_files(
    settings: Settings, folder: Path, *, host: str, network: str, ports: tuple[int, int]
) -> dict[str, str]:
    """Slurm's configuration files by name.

    Args:
        settings: the cluster.
        folder: of the cluster's state, which all nodes see.
        host: this machine's name; it is the controller.
        network: first three numbers of the addresses: nodes from .1 on, the controller at .254.
        ports: of the controller and of the nodes.
    """
    types = f"Type={settings.gpu_type} " if settings.gpu_type else ""
    nodes, gres = [], []
    for index, node in enumerate(settings.nodes):
        name = node_name(index)
        has_gpus = f"Gres=gpu:{settings.gpu_type}:{node.gpus} " if node.gpus else ""
        nodes.append(
            f"NodeName={name} NodeAddr={network}.{index + 1} CPUs={node.cpus} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={node.cpus} ThreadsPerCore=1 RealMemory=1000000 "
            f"{has_gpus}State=UNKNOWN"
        )
        if node.gpus:
            # Slurm wants a device for each GPU; a link to any device will do.
            devices = f"{folder}/gpus/gpu[0-{node.gpus - 1}]"
            gres.append(f"NodeName={name} Name=gpu {types}File={devices}")
    main = _MAIN.format(
        folder=folder,
        host=host,
        address=f"{network}.254",
        controller_port=ports[0],
        node_port=ports[1],
        slurmd_timeout_s=settings.slurmd_timeout_s,
        requeue_pause_s=settings.requeue_pause_s,
        grace_s=settings.grace_s,
        gres_types="GresTypes=gpu" if gres else "",
        nodes="\n".join(nodes),
    )
    return {"slurm.conf": main, "gres.conf": "\n".join(gres) + "\n"}


_MAIN = """\
ClusterName=headway
SlurmctldHost={host}({address})
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_pause_s}
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/local
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
# Without systemd and cgroups: processes are followed through /proc, and none is bound to a CPU.
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
# What this file says of a node wins over what the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
{gres_types}
# Answers within seconds: a test cannot wait for minutes.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout={slurmd_timeout_s}
MessageTimeout=5
BatchStartTimeout=20
KillWait=10
UnkillableStepTimeout=30
MinJobAge=3600
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/ended_jobs.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=graced Nodes=ALL PriorityTier=1 GraceTime={grace_s} MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
