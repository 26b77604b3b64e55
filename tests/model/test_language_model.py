"""What flows where in the model, and what it is with a single head."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.backward import joint_loss, sequential_backward
from model.hugging_face.names import hf_names, split
from model.language_model import MultiTokenModel
from model.structure.parameter_shapes import parameter_shapes
from tests.support.tiny_model import head_logits, tiny_config, tiny_model, tiny_weights

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
LABELS = torch.tensor([[[1, 4, 1, 5, 9, 2, 6, 5], [7, 1, 8, 2, 8, 1, 8, -100]]])


def plain_llama() -> LlamaForCausalLM:
    """A Llama of the tiny model's sizes, from transformers, with one head's weights."""
    config = tiny_config(future_tokens=1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.attention_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
        )
    ).double()
    state = {
        hf_name: part
        for name, tensor in tiny_weights(config).items()
        for hf_name, part in zip(hf_names(name, config), split(name, tensor, config), strict=True)
    }
    llama.load_state_dict(state)
    return llama


@pytest.mark.parametrize("backward", [sequential_backward, joint_loss])
def test_one_head_is_a_plain_llama(backward: object) -> None:
    """With n = 1 loss and every gradient are those of transformers' Llama of L layers."""
    assert callable(backward)
    config = tiny_config(future_tokens=1)
    model = tiny_model(config).train().requires_grad_(True)
    count = (LABELS != -100).sum()
    result = backward(model, model(TOKENS), LABELS, torch.ones(1).double() / count, chunk_tokens=5)
    result.surrogate_loss.backward()
    llama = plain_llama()
    logits = llama(TOKENS).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
    loss.backward()
    torch.testing.assert_close(result.loss_sums[0].float() / count, loss.float())
    theirs = dict(llama.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        for hf_name, part in zip(
            hf_names(name, config), split(name, parameter.grad, config), strict=True
        ):
            # the rotary table and our loss are kept in fp32
            torch.testing.assert_close(part, theirs[hf_name].grad, rtol=1e-4, atol=1e-6)


def changed_heads(name_part: str) -> list[int]:
    """Heads whose logits change when the parameters with this in their names do."""
    config = tiny_config()
    weights = tiny_weights(config)
    before = head_logits(tiny_model(config), TOKENS)
    chosen = [name for name in weights if name_part in name]
    assert chosen
    after = head_logits(
        tiny_model(config, weights | {name: weights[name] * 1.5 for name in chosen}), TOKENS
    )
    return [k for k in range(1, 5) if not torch.equal(before[k - 1], after[k - 1])]


@pytest.mark.parametrize("head", [1, 2, 3, 4])
def test_heads_are_parallel(head: int) -> None:
    """A head layer's weights change that head's logits and no other head's."""
    assert changed_heads(f"heads.layers.{head}.") == [head]


@pytest.mark.parametrize("shared", ["trunk.layers.1.", "trunk.embedding", "heads.readout.weight"])
def test_trunk_and_lm_head_are_shared(shared: str) -> None:
    """What is shared changes all heads."""
    assert changed_heads(shared) == [1, 2, 3, 4]


@pytest.mark.parametrize("position", range(1, 8))
def test_no_head_sees_the_future(position: int) -> None:
    """Another token at a position changes no head's logits before it and all heads' from it."""
    model = tiny_model(tiny_config())
    changed = TOKENS.clone()
    changed[:, position] = 19
    before, after = head_logits(model, TOKENS), head_logits(model, changed)
    torch.testing.assert_close(after[:, :, :position], before[:, :, :position], rtol=0, atol=1e-14)
    assert ((after - before)[:, :, position:].abs().amax((2, 3)) > 1e-6).all()


@pytest.mark.parametrize("heads", [1, 3])
def test_parameters_are_those_of_the_formulas(heads: int) -> None:
    """Names, order and shapes computed from the sizes are those of the built model."""
    config = tiny_config(future_tokens=heads)
    model = MultiTokenModel(config)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(built.items()) == list(parameter_shapes(config).items())
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
