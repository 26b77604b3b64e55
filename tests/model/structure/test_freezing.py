"""Freezing: which parameters stay, and that nothing is kept for their backward."""

import pytest
import torch

from benchmarks.saved_tensors import SavedTensorMeter
from model.backward import joint_loss, sequential_backward
from model.layers import Checkpointing
from model.structure.freezing import freeze_parameters, is_trained
from model.structure.parameter_shapes import parameter_shapes
from tests.model.test_backward import Backward, make_batch, run
from tests.support.tiny_model import tiny_config, training_model


def test_the_next_token_model_is_what_is_frozen() -> None:
    """Embedding, trunk, head 1, final norm and unembedding stay; all of heads 2 .. n is trained."""
    names = parameter_shapes(tiny_config())
    trained = {name for name in names if is_trained(name, "trunk")}
    assert trained == {
        name for name in names if name.startswith("heads.layers.") and "1" not in name.split(".")[2]
    }
    assert len(trained) == 3 * 6
    assert all(is_trained(name, "none") for name in names)


@pytest.mark.parametrize("backward", [sequential_backward, joint_loss])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_heads_get_the_gradients_of_the_whole_model(
    backward: Backward, checkpointing: Checkpointing
) -> None:
    """Losses of all heads and gradients of heads 2 .. n are those without freezing."""
    expected_losses, expected = run(training_model(), joint_loss)
    model = training_model(checkpointing)
    freeze_parameters(model, "trunk")
    losses, gradients = run(model, backward)
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-12)
    for name, wanted in expected.items():
        found = gradients[name]
        if is_trained(name, "trunk"):
            assert found is not None, name
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        else:
            assert found is None, name


def _peaks(layers: int) -> tuple[int, int]:
    """Most bytes kept for backward: by the trunk's forward alone, and in a whole step."""
    model = training_model(layers=layers)
    freeze_parameters(model, "trunk")
    tokens, _ = make_batch()
    with SavedTensorMeter(excluded=model.parameters()) as trunk:
        output = model(tokens)
    assert not output.requires_grad
    with SavedTensorMeter(excluded=model.parameters()) as step:
        run(model, sequential_backward)
    return trunk.peak, step.peak


def test_no_graph_of_the_trunk_is_kept() -> None:
    """The trunk keeps nothing for backward, so a step's memory does not grow with its depth."""
    shallow, deep = _peaks(layers=4), _peaks(layers=12)
    assert shallow[0] == deep[0] == 0
    assert shallow[1] == deep[1] > 0
