"""Low-rank adapters of a model with a memory: what they add, and how many parameters they have."""

import math

import torch

from model.memory.adapters import adapters_of, is_adapter
from model.structure.freezing import is_trained
from model.structure.parameter_shapes import parameter_shapes
from tests.support.tiny_model import tiny_config, tiny_model, tiny_weights

ADAPTED = {"segment": 6, "adapter_rank": 2, "adapter_alpha": 6.0}
TOLERANCE = 1e-10  # float64, and two orders of the same sums


def test_what_they_add_is_a_product_of_low_rank() -> None:
    """A model with adapters gives the logits of W + alpha / r B A, in the trunk alone."""
    config, plain = tiny_config(memory=ADAPTED), tiny_config(memory={"segment": 6})
    weights = {name: weight.double() for name, weight in tiny_weights(config).items()}
    merged = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for name in merged:
        if (names := adapters_of(name)) and names[0] in weights:
            assert name.startswith("trunk.layers.")
            merged[name] = merged[name] + 3.0 * weights[names[1]] @ weights[names[0]]
    tokens = torch.randint(20, (2, 15), generator=torch.Generator().manual_seed(1))
    logits = []
    for model in (tiny_model(config, weights), tiny_model(plain, merged)):
        trunk_output = model(tokens)
        logits.append(model.all_logits(trunk_output, model.heads_context(trunk_output)))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)


def test_fresh_ones_add_nothing() -> None:
    """B begins as zeros, A does not."""
    model = tiny_model(tiny_config(memory=ADAPTED))
    for name, shape in parameter_shapes(model.config).items():
        fresh = model.initial_weight(name, torch.Size(shape), seed=1)
        assert bool((fresh == 0).all()) is name.endswith("adapter.up")


def test_their_parameters_are_counted_and_trained() -> None:
    """In the formula, the shapes and the module alike; everything but memory and adapters stays."""
    config = tiny_config(memory=ADAPTED)
    shapes = parameter_shapes(config)
    assert sum(map(math.prod, shapes.values())) == config.num_parameters()
    module = {name: tuple(p.shape) for name, p in tiny_model(config).named_parameters()}
    assert module == shapes
    trained = {name for name in shapes if is_trained(name, "all_but_memory")}
    assert trained == {name for name in shapes if is_adapter(name) or name.startswith("memory.")}
    assert len(trained) == 4 + config.trunk_layers * 4 * 2
