"""The training engine on DeepSpeed for CPU and GPU; the only importer of deepspeed.

What DeepSpeed does: partitions parameters, gradients and optimizer states (ZeRO), reduces
gradients, clips and steps. What is decided here: when each gradient arrives (once per
micro-batch, see `model.backward`), what the losses are divided by, and that a step with
non-finite gradients does not reach the weights.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import Tensor

from data_prep.loading.loader import Batch
from model.backward import joint_loss, sequential_backward
from model.freezing import freeze_parameters
from model.hugging_face.importing import ImportedWeights
from model.language_model import MultiTokenModel
from model.layers import transformer_engine_available
from model.loss import IGNORED
from model.part import ModelPart
from model.sharding import placement_of
from pipeline.checkpoint.sharded_tensors import Snapshot, StateFiles, run_key
from pipeline.config.run_config import Precision, RunConfig
from pipeline.distributed.topology import Topology
from pipeline.engine.deepspeed_config import deepspeed_config
from pipeline.engine.evaluation import EvalResult, evaluate_heads
from pipeline.engine.gradients import discard_gradients, gradients_finite
from pipeline.engine.optimizer import build_adamw
from pipeline.engine.optimizer_state import (
    Fragment,
    adam_step,
    fragments,
    refresh_weights,
    set_adam_step,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class StepResult(NamedTuple):
    """What one optimizer step did; the same on all ranks.

    Attributes:
        head_losses: `[n]` mean loss of each head over its valid targets, on the device.
        grad_norm: global gradient norm before clipping.
        applied: False when gradients were not finite and the weights were left alone.
    """

    head_losses: Tensor
    grad_norm: float
    applied: bool


class Engine:
    """The model on this rank, wrapped by DeepSpeed.

    Holds the whole model; `pipeline.engine.staged_engine` trains a part of it.

    Args:
        config: the run.
        topology: the grid of ranks.
        precision: arithmetic of weights and activations.
        imported: initial weights from elsewhere (`model.hugging_face`); None = all fresh.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        precision: Precision,
        imported: ImportedWeights | None = None,
    ) -> None:
        self.config = config
        self.topology = topology
        self.dtype = _DTYPES[precision]
        settings = deepspeed_config(
            config,
            data_parallel_size=topology.data_size,
            precision=precision,
            device="cuda" if topology.device.type == "cuda" else "cpu",
        )
        _prepare_communication(topology)
        model = self._build_model(settings, imported)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_adamw(model, config.optimizer, fused=topology.device.type == "cuda"),
            mpu=topology,
            config=settings,
            dist_init_required=False,
        )
        self.model: MultiTokenModel = self._engine.module
        self._zero = config.parallel.zero
        self._weights = torch.tensor(config.model.loss_weights, device=topology.device)

    def _build_model(
        self, settings: dict[str, Any], imported: ImportedWeights | None
    ) -> MultiTokenModel:
        partitioned = self.config.parallel.zero == 3
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if partitioned:
            context = deepspeed.zero.Init(
                data_parallel_group=self.topology.get_data_parallel_group(),
                config_dict_or_path=settings,
                dtype=None,  # from the settings; given here, a CPU without fp16 turns it into bf16
                mpu=self.topology,
            )
        with context:
            model = MultiTokenModel(
                self.config.model,
                dtype=self.dtype,
                activation_checkpointing=self.config.train.activation_checkpointing,
                transformer_engine=self._uses_transformer_engine(),
                part=self._part(),
            )
        if not partitioned:
            model.to(self.topology.device)
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0, enabled=partitioned
            ):
                if not partitioned or self.topology.data_rank == 0:
                    fresh = functools.partial(
                        model.initial_weight, name, parameter.shape, self.config.run.seed
                    )
                    parameter.data.copy_(imported(name, fresh) if imported else fresh())
        freeze_parameters(model, self.config.train.freeze)
        return model

    def _part(self) -> ModelPart:
        """What this rank's stage holds of the model."""
        return ModelPart.whole(self.config.model)

    def _uses_transformer_engine(self) -> bool:
        wanted = self.config.train.transformer_engine and self.topology.device.type == "cuda"
        return wanted and transformer_engine_available()

    def train_step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: the rank's micro-batches of the step, `batch.accumulation` of them.
            learning_rate: for this step.
        """
        batches = [batch.to(self.topology.device) for batch in batches]
        counts = self._global_sum(sum((b.labels != IGNORED).sum((1, 2)) for b in batches))
        # DeepSpeed averages over data-parallel ranks; the loss is a mean over global targets.
        scales = self._weights * self.topology.data_size / counts.clamp(min=1)
        sums = self._run_micro_batches(batches, scales)
        head_losses = self._global_sum(sums) / counts.clamp(min=1)
        if not self._gradients_finite(head_losses):
            discard_gradients(self._engine, zero=self._zero)
            return StepResult(head_losses, float("nan"), applied=False)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._apply()
        if norm is None:
            return StepResult(head_losses, float("nan"), applied=False)
        return StepResult(head_losses, norm, applied=True)

    def _run_micro_batches(self, batches: list[Batch], scales: Tensor) -> Tensor:
        """Forward and backward of a step's micro-batches; each head's loss sum over them `[n]`."""
        sums = torch.zeros_like(scales)
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            sums += self._micro_step(batch, scales)
        return sums

    def _micro_step(self, batch: Batch, scales: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; each head's local loss sum `[n]`."""
        chunk = self.config.train.loss_chunk_tokens
        if self.config.train.head_backward == "joint":

            def joint(trunk_output: Tensor) -> tuple[Tensor, Tensor]:
                return joint_loss(
                    self.model,
                    trunk_output,
                    batch.labels,
                    scales,
                    chunk_tokens=chunk,
                    documents=batch.documents,
                )

            sums, remainder = self._engine(batch.tokens, joint, documents=batch.documents)
            # DeepSpeed divides the gradient of what a forward returned by the accumulation, unless
            # it has seen the loss before; without ZeRO it has not when the two are one tensor.
            remainder = remainder * 1.0
        else:
            trunk_output = self._engine(batch.tokens, documents=batch.documents)
            sums, remainder = sequential_backward(
                self.model,
                trunk_output,
                batch.labels,
                scales,
                chunk_tokens=chunk,
                documents=batch.documents,
            )
        self._engine.backward(remainder, scale_wrt_gas=False)
        return sums.float()

    def _apply(self) -> float | None:
        """Clip and step.

        Returns:
            The global gradient norm before clipping; None when it overflowed (finite gradients
            whose squares are not) and no step was taken. The same on all ranks.
        """
        if self._zero == 0:
            # Without ZeRO DeepSpeed reports no norm, or one that misses tensor-parallel parts.
            limit = self.config.optimizer.gradient_clipping or float("inf")
            norm = float(
                clip_grad_norm_(self.model.parameters(), max_norm=limit, mpu=self.topology)
            )
            if not math.isfinite(norm):
                discard_gradients(self._engine, zero=self._zero)
                return None
            self._engine.step()
            return norm
        self._engine.step()
        return (
            float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else None
        )

    def _gradients_finite(self, head_losses: Tensor) -> bool:
        """Whether losses and gradients are finite on all ranks, agreed by all ranks."""
        finite = head_losses.isfinite().all() & gradients_finite(
            self.model, self._engine.optimizer, zero=self._zero, device=head_losses.device
        )
        flag = finite.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _global_sum(self, tensor: Any) -> Tensor:
        """Sum over the ranks that hold different data."""
        dist.all_reduce(tensor, group=self.topology.get_data_parallel_group())
        return tensor

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Losses and head agreement over this rank's share of the validation samples.

        Every rank passes equally many batches; rows that are only padding have no labels.
        """
        self._engine.eval()
        with torch.no_grad():
            sums = self._evaluate_batches(batch.to(self.topology.device) for batch in batches)
        self._engine.train()
        return EvalResult.from_sums(self._global_sum(sums))

    def _evaluate_batches(self, batches: Iterator[Batch]) -> Tensor:
        heads = self.config.model.future_tokens
        sums = torch.zeros(3 * heads, dtype=torch.float64, device=self.topology.device)
        for batch in batches:
            sums += self._evaluate_batch(batch)
        return sums

    def _evaluate_batch(self, batch: Batch) -> Tensor:
        """What `evaluate_heads` gives, for all heads."""

        def heads(trunk_output: Tensor) -> Tensor:
            return evaluate_heads(
                self.model, trunk_output, batch, chunk_tokens=self.config.train.loss_chunk_tokens
            )

        sums: Tensor = self._engine(batch.tokens, heads, documents=batch.documents)
        return sums

    def stage_idle_fractions(self) -> list[float]:
        """Share of the steps since the last call that each stage waited; none for one stage."""
        return []

    @property
    def waiting_for(self) -> str | None:
        """Which transfer this rank is waiting for, if any."""
        return None

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of this tensor-parallel rank, gathered over ZeRO, one at a time.

        A collective: all ranks iterate together.
        """
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero == 3):
                yield name, parameter.detach()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of this rank's trained parameters, reduced and whole, before `_apply`."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._zero == 0:
                assert parameter.grad is not None, name
                yield name, parameter.grad
            else:
                yield name, deepspeed.utils.safe_get_full_grad(parameter)

    def snapshot(self) -> Snapshot:
        """This rank's share of weights and optimizer states, as views that training changes."""
        runs = {}
        for fragment in self._fragments():
            placement = placement_of(fragment.name)
            if placement.dim is None and self.topology.tensor_rank > 0:
                continue  # every tensor-parallel rank has the same, and the first one saves it
            start = fragment.start + (fragment.owned.start or 0)
            for kind, view in fragment.views.items():
                if (run := view[fragment.owned]).numel():
                    runs[run_key(kind, fragment.name, start)] = run
        return Snapshot(
            self.topology.info.rank,
            self.topology.tensor_rank,
            self.topology.tensor_size,
            adam_step(self._engine.optimizer),
            runs,
        )

    def save(self, directory: Path) -> None:
        """Write weights and optimizer states into `directory`, each rank its own file."""
        self.snapshot().write(directory)

    def load(self, directory: Path) -> None:
        """Read weights and optimizer states that were saved in any layout; a collective.

        Each rank reads its own share, a parameter at a time. The optimizer's settings stay those
        of this run.

        Raises:
            CheckpointError: the files do not hold this model.
        """
        files = StateFiles(directory, self.config.model)
        for fragment in self._fragments():
            for kind, view in fragment.views.items():
                part = files.part(
                    kind,
                    fragment.name,
                    tensor_rank=self.topology.tensor_rank,
                    tensor_size=self.topology.tensor_size,
                    start=fragment.start,
                    stop=fragment.stop,
                )
                view.copy_(part)
        set_adam_step(self._engine.optimizer, files.adam_step)
        refresh_weights(self.model, self._engine.optimizer, zero=self._zero)

    def _fragments(self) -> Iterator[Fragment]:
        return fragments(
            self.model,
            self._engine.optimizer,
            zero=self._zero,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
        )


def gathered(parameters: list[Tensor], *, partitioned: bool) -> Any:
    """A context in which parameters that ZeRO-3 has partitioned are whole; a collective."""
    return deepspeed.zero.GatheredParameters(parameters, enabled=partitioned)


def confine_trace_check(group: dist.ProcessGroup) -> None:
    """Let ZeRO-3 compare the order of its modules among the ranks that run the same ones.

    DeepSpeed compares it with world rank 0, which with pipeline stages runs other modules, or
    none at that time: the comparison would wait for ever.
    """

    def assert_same(numbers: list[int]) -> None:
        gathered_numbers: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered_numbers, numbers, group=group)
        if any(other != numbers for other in gathered_numbers):
            raise RuntimeError(f"data-parallel ranks disagree on a trace of {len(numbers)} entries")

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = assert_same


def _prepare_communication(topology: Topology) -> None:
    """Let DeepSpeed use the process group that exists."""
    os.environ["LOCAL_RANK"] = str(topology.device.index or 0)
    # On a CPU each rank would compile this op at start; a rank killed meanwhile leaves a lock
    # file behind that makes every later start on the machine wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
