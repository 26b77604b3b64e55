"""One training engine on DeepSpeed for CPU and GPU; the only importer of deepspeed.

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
from torch import Tensor, nn

from data_prep.loader import Batch
from model.backward import joint_backward, sequential_backward
from model.errors import CheckpointError
from model.freezing import freeze_parameters
from model.hf_import import ImportedWeights
from model.language_model import MultiTokenModel
from model.layers import transformer_engine_available
from model.loss import IGNORED, loss_and_predictions
from pipeline.config import Precision, RunConfig
from pipeline.deepspeed_config import deepspeed_config
from pipeline.topology import Topology
from pipeline.zero_files import TAG

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


class EvalResult(NamedTuple):
    """Validation figures; the same on all ranks.

    Attributes:
        head_losses: mean loss of each head, head 1 first.
        tokens_per_forward: expected tokens that greedy self-speculation with all heads commits
            per forward: 1 + the sum over j of the share of positions where heads 2 .. j all
            agree with head 1 (which sees the true text, as a verifier does after acceptance).
    """

    head_losses: list[float]
    tokens_per_forward: float


class Engine:
    """The model on this rank, wrapped by DeepSpeed.

    Args:
        config: the run.
        topology: the grid of ranks.
        precision: arithmetic of weights and activations.
        imported: initial weights from elsewhere, see `model.hf_import`; None = all fresh.
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
            optimizer=self._build_optimizer(model),
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

    def _uses_transformer_engine(self) -> bool:
        wanted = self.config.train.transformer_engine and self.topology.device.type == "cuda"
        return wanted and transformer_engine_available()

    def _build_optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over what is trained; matrices decay, norm weights do not."""
        options = self.config.optimizer
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = [p for name, p in parameters.items() if not name.endswith(_UNDECAYED)]
        undecayed = [p for name, p in parameters.items() if name.endswith(_UNDECAYED)]
        return torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options.weight_decay, "decayed": True},
                {"params": undecayed, "weight_decay": 0.0, "decayed": False},
            ],
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            fused=self.topology.device.type == "cuda",
        )

    def train_step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: the rank's micro-batches of the step, `batch.accumulation` of them.
            learning_rate: for this step.
        """
        batches = [self._to_device(batch) for batch in batches]
        counts = self._global_sum(sum((b.labels != IGNORED).sum((1, 2)) for b in batches))
        # DeepSpeed averages over data-parallel ranks; the loss is a mean over global targets.
        scales = self._weights * self.topology.data_size / counts.clamp(min=1)
        sums = torch.zeros_like(self._weights)
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            sums += self._micro_step(batch, scales)
        head_losses = self._global_sum(sums) / counts.clamp(min=1)
        if not self._gradients_finite(head_losses):
            self._discard_gradients()
            return StepResult(head_losses, float("nan"), applied=False)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._apply()
        if norm is None:
            return StepResult(head_losses, float("nan"), applied=False)
        return StepResult(head_losses, norm, applied=True)

    def _micro_step(self, batch: Batch, scales: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; each head's local loss sum `[n]`."""
        chunk = self.config.train.loss_chunk_tokens
        if self.config.train.head_backward == "joint":

            def joint(trunk_output: Tensor) -> tuple[Tensor, Tensor]:
                return joint_backward(
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
                self._discard_gradients()
                return None
            self._engine.step()
            return norm
        self._engine.step()
        return (
            float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else None
        )

    def _gradients_finite(self, head_losses: Tensor) -> bool:
        """Whether losses and gradients are finite on all ranks, agreed by all ranks."""
        finite = head_losses.isfinite().all()
        if self._zero == 0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    finite &= parameter.grad.isfinite().all()
        else:
            finite &= not self._engine.optimizer.has_overflow()
        flag = finite.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _discard_gradients(self) -> None:
        """Forget the gradients of a step that will not be taken."""
        optimizer = self._engine.optimizer
        if self._zero == 0:
            self._engine.zero_grad()
            optimizer.zero_grad()
        else:
            optimizer.zero_grad()
            for index in list(optimizer.averaged_gradients):
                optimizer.averaged_gradients[index] = None
        if self._zero in (1, 2):
            for index in list(optimizer.all_grad_tensors):
                optimizer.all_grad_tensors[index] = None
            optimizer.micro_step_id = -1
        if self._zero == 3:
            optimizer.averaged_gradients = {}

    def _to_device(self, batch: Batch) -> Batch:
        device, documents = self.topology.device, batch.documents
        return Batch(
            batch.tokens.to(device, non_blocking=True),
            batch.labels.to(device, non_blocking=True),
            None if documents is None else documents.to(device, non_blocking=True),
        )

    def _global_sum(self, tensor: Any) -> Tensor:
        """Sum over the ranks that hold different data."""
        dist.all_reduce(tensor, group=self.topology.get_data_parallel_group())
        return tensor

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Losses and head agreement over this rank's share of the validation samples.

        Every rank passes equally many batches; rows that are only padding have no labels.
        """
        heads = self.config.model.future_tokens
        sums = torch.zeros(3 * heads, dtype=torch.float64, device=self.topology.device)
        self._engine.eval()
        with torch.no_grad():
            for batch in batches:
                batch = self._to_device(batch)
                evaluate = functools.partial(self._evaluate_batch, batch)
                sums += self._engine(batch.tokens, evaluate, documents=batch.documents)
        self._engine.train()
        losses, counts, agreed = self._global_sum(sums).view(3, heads)
        positions = agreed[0].clamp(min=1)
        return EvalResult(
            (losses / counts.clamp(min=1)).tolist(), float((agreed / positions).sum())
        )

    def _evaluate_batch(self, batch: Batch, trunk_output: Tensor) -> Tensor:
        """`[3 * n]`: loss sums, target counts, and positions where heads 1 .. k all agree."""
        context = self.model.context(trunk_output.shape[0], trunk_output.device, batch.documents)
        norm, unembedding = self.model.heads.readout()
        losses, predictions = [], []
        for head, targets in zip(self.model.heads.numbers, batch.labels, strict=True):
            hidden = self.model.heads.hidden(head, trunk_output, context)
            loss, best = loss_and_predictions(
                self.model.heads.readout.normalize(hidden, norm).flatten(0, 1),
                unembedding,
                targets.t().flatten(),
                shard=self.model.shard,
                chunk_tokens=self.config.train.loss_chunk_tokens,
            )
            losses.append(loss)
            predictions.append(best.view(trunk_output.shape[:2]))
        valid = batch.labels != IGNORED
        counts = valid.sum((1, 2))
        agreed = agreement_counts(torch.stack(predictions), valid.transpose(1, 2))
        return torch.cat([torch.stack(losses).double(), counts.double(), agreed.double()])

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

    def save(self, directory: Path) -> None:
        """Write weights and optimizer states below `directory`, each rank its own files."""
        self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, in the same layout.

        Raises:
            CheckpointError: DeepSpeed finds no files of this layout there.
        """
        loaded, _ = self._engine.load_checkpoint(str(directory), tag=TAG)
        if loaded is None:
            raise CheckpointError(
                f"{directory} holds no files that DeepSpeed can load in this layout; use another "
                "checkpoint"
            )
        # The checkpoint's optimizer brings its own settings; those of this run hold.
        options = self.config.optimizer
        for group in self._engine.optimizer.param_groups:
            decay = options.weight_decay if group["decayed"] else 0.0
            group.update(weight_decay=decay, betas=options.betas, eps=options.eps)


def agreement_counts(predictions: Tensor, valid: Tensor) -> Tensor:
    """Positions where the first k heads all predict what head 1 predicts in their place.

    Head k at position t and head 1 at position t + k - 1 predict the same token t + k. With three
    heads, position t counts for k = 3 when head 2 at t equals head 1 at t+1 and head 3 at t equals
    head 1 at t+2. Positions whose comparison would leave the window are left out. A token past the
    end of the position's document is no agreement: decoding stops there.

    Args:
        predictions: `[n, S, B]` most likely tokens.
        valid: `[n, S, B]` bool, whether head k has a target at t: false for padding, and with
            masked documents past the document's end.

    Returns:
        `[n]` counts, never rising; the first is the number of positions compared.
    """
    heads, length = predictions.shape[0], predictions.shape[1]
    compared = length - heads + 1
    agree = valid[0, :compared].clone()
    counts = []
    for index in range(heads):
        agree &= valid[index, :compared]
        agree &= predictions[index, :compared] == predictions[0, index : index + compared]
        counts.append(agree.sum())
    return torch.stack(counts)


_UNDECAYED = ("layernorm.weight", "norm_weight")


def _prepare_communication(topology: Topology) -> None:
    """Let DeepSpeed use the process group that exists."""
    os.environ["LOCAL_RANK"] = str(topology.device.index or 0)
    # On a CPU each rank would compile this op at start; a rank killed meanwhile leaves a lock
    # file behind that makes every later start on the machine wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
