"""`forward(labels=...)` of the class that exports carry: training on keeps the heads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from model.hugging_face.modeling_headway import HeadwayForCausalLM
from tests.support.tiny_export import VOCABULARY, export_tiny

HEADS = 4
TEXTS = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
# Nothing to learn at the beginning of one text, and from another at all.
LABELS = torch.where(torch.arange(12) < torch.tensor([[0], [5], [12]]), -100, TEXTS)
TOLERANCE = 1e-6  # fp32, gradients up to 0.5


@pytest.fixture
def model(export: Path) -> HeadwayForCausalLM:
    """Ready to train."""
    return HeadwayForCausalLM.from_pretrained(export).train()


def _plain_losses(logits: Tensor, labels: Tensor, reduction: str = "mean") -> list[Tensor]:
    """Cross-entropy of each head's logits `[B, S, n, V]`, by its definition."""
    return [
        F.cross_entropy(
            logits[:, :-k, k - 1].flatten(0, 1), labels[:, k:].flatten(), reduction=reduction
        )
        for k in range(1, HEADS + 1)
    ]


def _gradients(model: HeadwayForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_mean_over_heads_and_all_gradients(
    model: HeadwayForCausalLM, checkpointing: bool | None
) -> None:
    """Against the loss written out, with layers computed again in backward in either way."""
    plain = _plain_losses(model.all_head_logits(TEXTS), LABELS)
    expected = _gradients(model, torch.stack(plain).mean())
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    output = model(TEXTS, labels=LABELS)
    torch.testing.assert_close(output.head_losses, torch.stack(plain).detach())
    assert not output.head_losses.requires_grad
    found = _gradients(model, output.loss)
    assert found.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=TOLERANCE)


def test_head_1_is_the_llama(export: Path, model: HeadwayForCausalLM) -> None:
    """Its loss and logits are those of the plain class, with tuples for whoever wants them."""
    plain = LlamaForCausalLM.from_pretrained(export).train()(TEXTS, labels=LABELS)
    output = model(TEXTS, labels=LABELS)
    torch.testing.assert_close(output.head_losses[0], plain.loss.detach())
    assert torch.equal(output.logits, plain.logits)
    loss, logits, losses = model(TEXTS, labels=LABELS, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(losses, output.head_losses)
    assert model(TEXTS).loss is None


def test_parts_of_a_batch_add_up(model: HeadwayForCausalLM) -> None:
    """Given the number of items, losses of the rows sum to the loss of the batch."""
    items = (LABELS[:, 1:] != -100).sum()
    sums = _plain_losses(model.all_head_logits(TEXTS), LABELS, "sum")
    for given in (items, int(items)):
        whole = model(TEXTS, labels=LABELS, num_items_in_batch=given)
        torch.testing.assert_close(whole.head_losses, torch.stack(sums).detach() / items)
        rows = zip(TEXTS.split(1), LABELS.split(1), strict=True)
        parts = [model(t, labels=labels, num_items_in_batch=given).loss for t, labels in rows]
        torch.testing.assert_close(torch.stack(parts).sum(), whole.loss)


def test_texts_too_short_for_a_head_cost_nothing(model: HeadwayForCausalLM) -> None:
    """A head without a target has loss 0, not a number that is none."""
    output = model(TEXTS[:, :3], labels=TEXTS[:, :3])
    assert output.head_losses[:2].min() > 0
    assert output.head_losses[2:].tolist() == [0, 0]
    assert all(g.isfinite().all() for g in _gradients(model, output.loss).values())


def test_weights_of_heads(model: HeadwayForCausalLM) -> None:
    """As config.head_weights has them, weighted mean; other numbers of weights are refused."""
    model.config.head_weights = [1, 0.5, 0, 2]
    output = model(TEXTS, labels=LABELS)
    weights = torch.tensor([1, 0.5, 0, 2])
    torch.testing.assert_close(output.loss.detach(), (weights * output.head_losses).sum() / 3.5)
    for wrong in ([1.0], [0, 0, 0, 0]):
        model.config.head_weights = wrong
        with pytest.raises(ValueError, match="must be 4 weights, one for each head"):
            model(TEXTS, labels=LABELS)


def test_exports_carry_the_weights_of_their_training(tmp_path: Path) -> None:
    """Where these are not all 1."""
    export_tiny(tmp_path / "export", head_weights=[2, 1, 1, 0])
    model = HeadwayForCausalLM.from_pretrained(tmp_path / "export")
    output = model(TEXTS, labels=LABELS)
    weights = torch.tensor([2.0, 1, 1, 0])
    torch.testing.assert_close(output.loss.detach(), (weights * output.head_losses).sum() / 4)


def test_a_cache_is_refused(model: HeadwayForCausalLM) -> None:
    """Heads 2 and up have not seen what is in it."""
    cache = model(TEXTS[:, :4]).past_key_values
    with pytest.raises(ValueError, match="pass whole texts"):
        model(TEXTS[:, 4:], labels=TEXTS[:, 4:], past_key_values=cache)


def test_logits_of_one_further_head_exist_at_once(model: HeadwayForCausalLM) -> None:
    """What backward keeps of the vocabulary's size is head 1's, for any number of heads."""
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (VOCABULARY,) and tensor.numel() >= TEXTS.numel() * VOCABULARY:
            kept.append(tuple(tensor.shape))
        return tensor

    plain = copy.deepcopy(model)
    plain.config.future_tokens = 1
    plain.extra_heads.clear()
    counts = []
    for one in (plain, model):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            one(TEXTS, labels=LABELS).loss.detach()
        counts.append(len(kept))
    assert 0 < counts[1] <= counts[0]


class _Losses(TrainerCallback):
    """What the Trainer logs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.logs.append(logs)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_trains_all_heads(export: Path, tmp_path: Path, accumulation: int) -> None:
    """transformers.Trainer, with accumulation, evaluation, and a resume from what it saved."""
    samples = [{"input_ids": row, "labels": row} for row in TEXTS[:, :8].repeat(8, 1)]

    def train(resume: bool, steps: int) -> tuple[HeadwayForCausalLM, list[dict[str, Any]]]:
        losses = _Losses()
        trainer = Trainer(
            model=HeadwayForCausalLM.from_pretrained(export),
            args=TrainingArguments(
                output_dir=str(tmp_path / "run"),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=accumulation,
                max_steps=steps,
                save_steps=4,
                logging_steps=1,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=samples,
            eval_dataset=samples[:3],
            callbacks=[losses],
            compute_metrics=lambda found: {"shape": found.predictions.shape},
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.evaluate()["eval_shape"] == (3, 8, VOCABULARY)
        return trainer.model, losses.logs

    before = HeadwayForCausalLM.from_pretrained(export).train()
    first = float(before(TEXTS[:, :8], labels=TEXTS[:, :8]).loss.detach())
    model, logs = train(resume=False, steps=4)
    # The number of items is that of head 1; heads together have 22 / 28 of it, or of all tokens.
    assert 0.6 < logs[0]["loss"] / first < 0.9
    after = model(TEXTS[:, :8], labels=TEXTS[:, :8]).head_losses
    assert (after < before(TEXTS[:, :8], labels=TEXTS[:, :8]).head_losses - 0.5).all()
    saved = HeadwayForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name])
    resumed, _ = train(resume=True, steps=5)
    again = resumed.eval()(TEXTS[:, :8], labels=TEXTS[:, :8]).head_losses
    assert (again < after).all()
