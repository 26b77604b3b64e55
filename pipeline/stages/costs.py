"""What a plan of stages comes to: the order of its micro-batches, and how long each stage waits."""

from collections.abc import Sequence
from typing import NamedTuple

from model.config import ModelConfig
from model.structure.part import ModelPart

_PLAYED_MICRO_BATCHES = 128


class StageCost(NamedTuple):
    """What one micro-batch costs a stage, in layer-equivalents (forward and backward = 1 a layer).

    Attributes:
        forward: done when the input arrives.
        heads: forward and backward of its heads, done before the gradient from below is needed.
        backward: done when that gradient is there.
    """

    forward: float
    heads: float
    backward: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.heads + self.backward


def stage_costs(
    plan: Sequence[ModelPart], model: ModelConfig, *, recompute: bool
) -> list[StageCost]:
    """What a micro-batch costs each stage: backward is twice forward, and more if it recomputes.

    Heads of a chain run forward when their input arrives and again in their turn of the backward,
    which waits for the gradient of the heads after them.
    """
    head = model.head_layer_equivalents
    repeated = 1 / 3 if recompute else 0.0
    if model.chain:
        forward = model.layers_per_head / 3
        return [
            StageCost(
                len(part.trunk_layers) / 3 + len(part.heads) * forward,
                0.0,
                len(part.trunk_layers) * (2 / 3 + repeated) + len(part.heads) * head,
            )
            for part in plan
        ]
    repeated_head = repeated * model.layers_per_head
    return [
        StageCost(
            len(part.trunk_layers) / 3,
            len(part.heads) * (head + repeated_head),
            len(part.trunk_layers) * (2 / 3 + repeated),
        )
        for part in plan
    ]


def predicted_idle(
    costs: Sequence[StageCost],
    depth_of: Sequence[int],
    micro_batches: int,
    transfer: float = 0.0,
) -> list[float]:
    """Share of a step that each stage waits, by playing the 1F1B schedule through.

    Args:
        costs: of one micro-batch, per stage.
        depth_of: each stage's depth, see `depths`.
        micro_batches: M, of a step.
        transfer: time for a tensor to reach the next stage, in the units of the costs.

    Example: equal stages with forward and backward only: (S - 1) / (M + S - 1) each.
    """
    total = step_time(costs, depth_of, micro_batches, transfer)
    return [1 - micro_batches * cost.total / total for cost in costs]


def step_time(
    costs: Sequence[StageCost],
    depth_of: Sequence[int],
    micro_batches: int,
    transfer: float = 0.0,
) -> float:
    """Time of a step's micro-batches over all stages, in the units of the costs.

    Far more micro-batches than stages are not played through: once all stages are busy, each takes
    as long as the one before.
    """
    stages = len(costs)
    played = max(_PLAYED_MICRO_BATCHES, 4 * stages)
    if micro_batches > played:
        time, half = (step_time(costs, depth_of, n, transfer) for n in (played, played // 2))
        return time + (micro_batches - played) * (time - half) / (played - played // 2)
    orders = [micro_batch_order(d, depth_of[-1] + 1, micro_batches) for d in depth_of]
    position = [0] * stages
    clock = [0.0] * stages
    arrived: dict[tuple[str, int, int], float] = {}  # (what, stage, micro-batch): when
    while any(position[s] < len(orders[s]) for s in range(stages)):
        moved = False
        for stage in range(stages):
            while position[stage] < len(orders[stage]):
                is_forward, micro = orders[stage][position[stage]]
                first = stage == 0 if is_forward else stage == stages - 1
                needed = ("forward" if is_forward else "backward", stage, micro)
                if not first and needed not in arrived:
                    break
                ready = arrived.get(needed, 0.0)
                cost = costs[stage]
                if is_forward:
                    clock[stage] = max(clock[stage], ready) + cost.forward
                    # A stage of heads hands the trunk's output on as it comes.
                    arrived["forward", stage + 1, micro] = clock[stage] + transfer
                else:
                    clock[stage] = max(clock[stage] + cost.heads, ready) + cost.backward
                    arrived["backward", stage - 1, micro] = clock[stage] + transfer
                position[stage] += 1
                moved = True
        assert moved, "the schedule does not come to an end"
    return max(clock)


def micro_batch_order(depth: int, num_depths: int, micro_batches: int) -> list[tuple[bool, int]]:
    """The 1F1B order of one stage: (is forward, micro-batch), forward and backward of each once.

    A stage that has d depths after it runs d forwards ahead, then alternates, then drains.
    It is the order of DeepSpeed's `TrainSchedule`, which a test compares it with.
    """
    ahead = min(num_depths - 1 - depth, micro_batches)
    order = [(True, micro) for micro in range(ahead)]
    for micro in range(micro_batches):
        if micro + ahead < micro_batches:
            order.append((True, micro + ahead))
        order.append((False, micro))
    return order
