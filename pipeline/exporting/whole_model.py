"""Logits of an export against those of the weights it was made from, whole models in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from model.errors import CheckpointError
from model.hugging_face.folder import ExportDescription

if TYPE_CHECKING:
    from torch import Tensor

    from model.language_model import MultiTokenModel

# fp32 on the same weights in another order of additions; logits of a wrong model are off by more.
RELATIVE_TOLERANCE = 1e-4
_PARITY_ROWS = 2
_PARITY_TOKENS = 64


class Parity(NamedTuple):
    """Largest differences of logits.

    Attributes:
        way: how they were computed, for people: `whole models` or `layer by layer`.
        transformers: head 1, `transformers` on the folder (where the next-token model is no plain
            Llama, with its class) against our model on the checkpoint.
        all_heads: each head, the folder's own class in `transformers` against the same.
        reloaded: each head, our model on the folder against our model on the checkpoint; empty
            layer by layer.
        largest_logit: largest absolute logit, the scale of the differences.
    """

    way: str
    transformers: float
    all_heads: tuple[float, ...]
    reloaded: tuple[float, ...]
    largest_logit: float

    @property
    def holds(self) -> bool:
        """Whether all differences are rounding; not so when one is not a number."""
        limit = RELATIVE_TOLERANCE * self.largest_logit
        differences = (self.transformers, *self.all_heads, *self.reloaded)
        return all(difference <= limit for difference in differences)

    def summary(self) -> str:
        """One line."""
        reloaded = f"; reloaded {_shown(self.reloaded)}" if self.reloaded else ""
        return (
            f"{self.way}: largest difference of logits (up to {self.largest_logit:.3g}): head 1 in "
            f"transformers {self.transformers:.2g}; heads 1 to {len(self.all_heads)} in its class "
            f"with all heads {_shown(self.all_heads)}{reloaded}"
        )


def _shown(differences: tuple[float, ...]) -> str:
    return ", ".join(f"{difference:.2g}" for difference in differences)


def parity_tokens(description: ExportDescription) -> "Tensor":
    """`[B, S]` the tokens that logits are compared on."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (_PARITY_ROWS, min(_PARITY_TOKENS, description.sequence_length))
    return torch.randint(description.model.vocab_size, shape, generator=generator)


def compare(
    folder: Path, description: ExportDescription, weights: Iterator[tuple[str, "Tensor"]]
) -> Parity:
    """Compare an export with the weights it was made from, in fp32, one model in memory at a time.

    Args:
        folder: the export.
        description: what it is of.
        weights: whole parameters that it was made from.
    """
    import torch

    from model.hugging_face.loading import DTYPES, build_model, load_export

    tokens = parity_tokens(description)
    stored = ((name, tensor.to(DTYPES[description.dtype])) for name, tensor in weights)
    expected = head_logits(build_model(description.model, stored, torch.float32), tokens)
    reloaded = head_logits(load_export(folder, torch.float32).model, tokens)
    linear = description.model.head_kind == "linear"
    plain = _transformers_logits(folder, tokens, all_heads=False, linear=linear)[0]
    heads = _transformers_logits(folder, tokens, all_heads=True, linear=linear)
    return Parity(
        way="whole models",
        transformers=float((plain - expected[0]).abs().max()),
        all_heads=tuple((heads - expected).abs().amax((1, 2, 3)).tolist()),
        reloaded=tuple((reloaded - expected).abs().amax((1, 2, 3)).tolist()),
        largest_logit=float(expected.abs().max()),
    )


def head_logits(model: "MultiTokenModel", tokens: "Tensor") -> "Tensor":
    """`[n, B, S, V]` of all heads, from the same forward that training runs."""
    import torch

    with torch.no_grad():
        trunk_output = model(tokens)
        context = model.context(tokens.shape[1], tokens.device)
        return model.all_logits(trunk_output, context).transpose(1, 2)


def _transformers_logits(
    folder: Path, tokens: "Tensor", *, all_heads: bool, linear: bool
) -> "Tensor":
    """`[1 or n, B, S, V]` of the folder as a plain Llama, or as its own class of all heads.

    With linear heads there is no plain Llama, and its class gives both.
    """
    import torch
    import transformers

    from model.hugging_face import modeling_headway

    transformers.utils.logging.disable_progress_bar()
    kind = modeling_headway.HeadwayForCausalLM if all_heads else transformers.AutoModelForCausalLM
    if linear:
        kind = modeling_headway.HeadwayLinearForCausalLM
    try:
        model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except ValueError as error:
        raise CheckpointError(f"transformers refuses the written model: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(problem):
            raise CheckpointError(
                f"transformers reports {problem} in the written model: "
                f"{sorted(map(str, found[problem]))[:3]}; nothing was exported"
            )
    with torch.no_grad():
        logits: Tensor
        if all_heads:
            logits = model.eval().all_head_logits(tokens).permute(2, 0, 1, 3)
        else:
            logits = model.eval()(tokens, use_cache=False).logits.unsqueeze(0)
    return logits
