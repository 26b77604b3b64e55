"""The sizes of a model, what must hold between them, and what follows from them."""

from collections.abc import Callable, Iterable
from math import gcd, isqrt
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from model.memory.sizes import MemorySizes
from model.operations.rope_scaling import RopeScaling
from model.structure import head_weights
from model.structure.head_kinds import HeadKind, LMHeadKind, head_order, is_chain, next_token_heads
from model.structure.head_weights import HeadWeights

_FFN_MULTIPLE = 256

# Far above any model; below, what is computed from the sizes takes no time and no room.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24

Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
Width = Annotated[int, Field(gt=0, le=MAX_WIDTH)]


class ParameterCount(NamedTuple):
    """Parameters by part."""

    embedding: int
    trunk_layers: int
    head_layers: int
    final_norm: int
    unembedding: int
    memory: int = 0

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return sum(self)


def _default_kv_heads(fields: dict[str, Any]) -> int:
    return int(fields["attention_heads"])


def _default_embedding_init_std(fields: dict[str, Any]) -> float:
    return float(fields["init_std"])


def _default_ffn_hidden_size(fields: dict[str, Any]) -> int:
    exact = fields["hidden_size"] * 8
    return int(-(-exact // (3 * _FFN_MULTIPLE)) * _FFN_MULTIPLE)


class ModelConfig(BaseModel):
    """A Llama-style model with several future-token heads.

    An L-layer model has L - n trunk layers and n heads of one layer each, so its size does not
    depend on n. Embedding and unembedding are not tied. Linear heads are no layers: they come on
    top of L trunk layers. So do the further unembeddings of a replicated LM head.

    Attributes:
        layers: L, trunk and heads together.
        hidden_size: H, width of the residual stream.
        attention_heads: query heads.
        vocab_size: V, rows of the embedding and of the unembedding.
        head_kind: what heads are and read: `parallel` (a transformer layer each, on the trunk's
            output), `causal` and `anticausal` (each on the output of the head before, the next
            token's head first or last), `linear` (one linear map each, on the trunk's output).
        head_layers: m, transformer layers of each head.
        lm_head: `shared` by all heads, or `replicated`: an unembedding for each, as models of
            bytes have (the final norm is shared).
        future_tokens: n, the number of heads; head k at position t predicts token t+k.
        kv_heads: key/value heads; as many as query heads unless given.
        ffn_hidden_size: width of the feed-forward layer; 8/3 of the hidden size, rounded up to a
            multiple of 256, unless given.
        rope_theta: base of the rotary frequencies.
        rope_scaling: scaling of those frequencies, for a model that was imported with one.
        norm_eps: epsilon of every RMSNorm.
        init_std: standard deviation of the initial weights.
        embedding_init_std: the same for the embedding; `init_std` unless given. A small model
            learns sooner when the token dominates the residual stream at first (1.0).
        head_weights: weight of each head's loss, head 1 first; all 1 unless given. Or weights by
            the step, as a list of [step, weights]: each holds after so many steps, until the next.
        memory: read the input in segments, with a memory of those before, as a mapping of the keys
            below; null = whole sequences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    layers: Layers
    hidden_size: Width
    attention_heads: Width
    vocab_size: Annotated[int, Field(gt=0, le=MAX_VOCABULARY)]
    head_kind: HeadKind = "parallel"
    head_layers: Layers = 1
    lm_head: LMHeadKind = "shared"
    future_tokens: Layers
    kv_heads: Width = Field(default_factory=_default_kv_heads)
    ffn_hidden_size: Annotated[int, Field(gt=0, le=4 * MAX_WIDTH)] = Field(
        default_factory=_default_ffn_hidden_size
    )
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    embedding_init_std: float = Field(default_factory=_default_embedding_init_std, gt=0)
    head_weights: HeadWeights | None = None
    memory: MemorySizes | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.attention_heads

    @property
    def trunk_layers(self) -> int:
        """Layers below the heads."""
        return self.layers - self.future_tokens * self.layers_per_head

    @property
    def layers_per_head(self) -> int:
        """Transformer layers of a head; none when it is linear."""
        return 0 if self.head_kind == "linear" else self.head_layers

    @property
    def head_order(self) -> range:
        """Heads in the order in which they are computed, see `model.structure.head_kinds`."""
        return head_order(self.head_kind, self.future_tokens)

    @property
    def chain(self) -> bool:
        """Whether each head reads what the one before it gives."""
        return is_chain(self.head_kind)

    @property
    def next_token_heads(self) -> range:
        """The heads that the next token's prediction passes, nearest to the trunk first."""
        return next_token_heads(self.head_kind, self.future_tokens)

    @property
    def next_token_layers(self) -> int:
        """Layers that the next token's prediction passes: those of a plain Llama of it."""
        return self.trunk_layers + len(self.next_token_heads) * self.layers_per_head

    def loss_weights(self, steps: int) -> tuple[float, ...]:
        """Weight of each head's loss, head 1 first, in the step that follows after `steps`."""
        return head_weights.weights_after(self.head_weights, self.future_tokens, steps)

    # A rule belongs to the later of its keys; it is skipped while the earlier one is invalid.
    @field_validator("head_layers")
    @classmethod
    def _linear_heads_have_none(cls, head_layers: int, info: ValidationInfo) -> int:
        if head_layers > 1 and info.data.get("head_kind") == "linear":
            raise ValueError(
                f"head_layers={head_layers} goes with heads that are layers, and "
                "model.head_kind=linear makes each one linear map; leave it at 1, or choose "
                "another kind"
            )
        return head_layers

    @field_validator("future_tokens")
    @classmethod
    def _leaves_a_trunk(cls, future_tokens: int, info: ValidationInfo) -> int:
        layers, each = info.data.get("layers"), info.data.get("head_layers")
        linear = info.data.get("head_kind", "linear") == "linear"
        if layers is None or each is None or linear or future_tokens * each < layers:
            return future_tokens
        what = "each head is one of the layers"
        if each > 1:
            what = f"each head is model.head_layers={each} of the layers"
        raise ValueError(
            f"future_tokens={future_tokens} must be smaller than model.layers={layers}"
            f"{f' / {each}' if each > 1 else ''}, since {what} and the trunk needs one; raise "
            f"model.layers to at least {future_tokens * each + 1}"
            + (f" or use 1 to {(layers - 1) // each} heads" if layers > each else "")
        )

    @field_validator("attention_heads")
    @classmethod
    def _heads_have_even_width(cls, heads: int, info: ValidationInfo) -> int:
        hidden = info.data.get("hidden_size")
        if hidden is None or hidden % (2 * heads) == 0:
            return heads
        nearest = _nearest(hidden, range(2 * heads, 2 * hidden + 2 * heads, 2 * heads))
        if hidden % heads:
            rule = f"is not a multiple of model.attention_heads={heads}"
        else:
            rule = (
                f"with model.attention_heads={heads} gives heads of odd width {hidden // heads}, "
                "and rotary positions need pairs"
            )
        raise ValueError(f"hidden_size={hidden} {rule}; {nearest}")

    @field_validator("kv_heads")
    @classmethod
    def _divides_attention_heads(cls, kv_heads: int, info: ValidationInfo) -> int:
        heads = info.data.get("attention_heads")
        if heads is not None and heads % kv_heads:
            raise ValueError(
                f"kv_heads={kv_heads} does not divide model.attention_heads={heads}; "
                + _nearest(kv_heads, _divisors(heads))
            )
        return kv_heads

    @field_validator("head_weights")
    @classmethod
    def _one_weight_per_head(
        cls, weights: HeadWeights | None, info: ValidationInfo
    ) -> HeadWeights | None:
        if weights is None:
            return None
        if problems := head_weights.problems(weights, info.data.get("future_tokens")):
            raise ValueError("\n".join(problems))
        return weights

    def parameter_count(self) -> ParameterCount:
        """Parameters by part, from the formulas.

        A layer of width H, feed-forward width F and K = kv_heads * head_dim holds
        (H + 2K) * H for queries, keys and values, H * H for the projection, 2 * F * H for gate and
        up, F * H for down, and 2 * H for its two norms. A head is m layers, or H * H when it is
        linear.
        """
        layer = self._matrix_parameters_per_layer() + 2 * self.hidden_size
        unembeddings = self.future_tokens if self.lm_head == "replicated" else 1
        return ParameterCount(
            embedding=self.vocab_size * self.hidden_size,
            trunk_layers=self.trunk_layers * layer,
            head_layers=self.future_tokens * (self.layers_per_head * layer or self.hidden_size**2),
            final_norm=self.hidden_size,
            unembedding=unembeddings * self.vocab_size * self.hidden_size,
            memory=self._memory_parameters(),
        )

    def num_parameters(self) -> int:
        """All parameters: 2VH + L * (layer) + H, whatever the number of heads.

        Linear heads add nH^2, a replicated LM head (n - 1)VH, and a memory 2 H d_h + 2H
        and its adapters.
        """
        return self.parameter_count().total

    @property
    def unembedding_layer_equivalents(self) -> float:
        """The unembedding's product in units of a layer's: V * H over a layer's matrix elements.

        Example: 32,000 tokens, width 4,096 and feed-forward width 11,008 give 0.65.
        """
        return self.vocab_size * self.hidden_size / self._matrix_parameters_per_layer()

    @property
    def head_layer_equivalents(self) -> float:
        """A head with its product with the unembedding, in units of a layer's matrices."""
        head = self.layers_per_head or self.hidden_size**2 / self._matrix_parameters_per_layer()
        return head + self.unembedding_layer_equivalents

    def flops_per_token(self, sequence_length: int, *, trained_heads: int | None = None) -> float:
        """Floating point operations of one training step per input token.

        A product with a matrix of P parameters costs 2P per token forward and 4P backward:

            6 * (L * layer_matrices + n * V * H)     every layer once, the unembedding once per head
            + 6 * L * H * S                          attention

        Attention forms queries x keys and weights x values, 2 * S * H each per layer and token,
        three times over for forward and backward: 12 * L * H * S, halved because a position sees
        on average half of the sequence. Linear heads count with their n * H^2 and attend to
        nothing. The embedding is a look-up. Recomputation, by activation checkpointing or in the
        backward of chains of heads, is not counted: utilization from this figure is of useful
        work.

        With all but some heads frozen, only their layers cost a whole backward. Their products
        with a shared unembedding cost half of one (the gradient of the hidden states), and
        everything else only its forward.

        Args:
            sequence_length: S, tokens of one sample.
            trained_heads: so many heads alone are trained; None = everything is.
        """
        matrices = self.layers * self._matrix_parameters_per_layer()
        head_matrices = self.layers_per_head * self._matrix_parameters_per_layer()
        if not head_matrices:
            head_matrices = self.hidden_size**2
            matrices += self.future_tokens * head_matrices
        unembeddings = self.future_tokens * self.vocab_size * self.hidden_size
        attention = 12 * self.layers * self.hidden_size * sequence_length / 2
        if trained_heads is not None:
            attending = trained_heads * self.layers_per_head / self.layers
            each = 4 if self.lm_head == "replicated" else 2
            backward: float = 4 * trained_heads * head_matrices
            backward += each * unembeddings * trained_heads / self.future_tokens
            return 2 * (matrices + unembeddings) + backward + attention * (1 + 2 * attending) / 3
        return 6 * (matrices + unembeddings) + attention

    def check_tensor_parallel(self, size: int) -> list[str]:
        """What keeps this model from being split over `size` tensor-parallel ranks.

        Returns:
            One line per size that cannot be divided, each starting with its key and ending with
            the nearest values that can; empty when the model splits.
        """

        def heads_work(value: int) -> bool:
            whole = self.hidden_size % value == 0 and value % self.kv_heads == 0
            return whole and (self.hidden_size // value) % 2 == 0

        ffn, vocabulary = self.ffn_hidden_size, self.vocab_size
        # The values that may work, and which of them do.
        candidates: dict[str, tuple[range, Callable[[int], bool]]] = {
            "attention_heads": (range(1, self.hidden_size + 1), heads_work),
            "kv_heads": (
                range(1, self.attention_heads + 1),
                lambda value: self.attention_heads % value == 0,
            ),
            "ffn_hidden_size": (range(1, ffn + size), lambda value: True),
            "vocab_size": (range(vocabulary, vocabulary + size), lambda value: True),
        }
        problems = []
        for key, (values, works) in candidates.items():
            value: int = getattr(self, key)
            if value % size:
                advice = _nearest(value, _nearest_multiples(value, size, values, works))
                problems.append(
                    f"{key}={value} is not divisible by the tensor-parallel size {size}; {advice}"
                )
        return problems

    @property
    def tensor_parallel_sizes(self) -> list[int]:
        """The tensor-parallel sizes that this model can be split over, smallest first."""
        sizes = (self.attention_heads, self.kv_heads, self.ffn_hidden_size, self.vocab_size)
        return _divisors(gcd(*sizes))

    def _memory_parameters(self) -> int:
        """Those of a memory, and of low-rank adapters: r (in + out) for each product's weight."""
        if self.memory is None:
            return 0
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        qkv = hidden + hidden + 2 * self.kv_heads * self.head_dim
        widths = qkv + 2 * hidden + (hidden + 2 * ffn) + (ffn + hidden)
        adapters = self.trunk_layers * self.memory.adapter_rank * widths
        return self.memory.num_parameters(hidden) + adapters

    def _matrix_parameters_per_layer(self) -> int:
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        qkv = (hidden + 2 * self.kv_heads * self.head_dim) * hidden
        return qkv + hidden * hidden + 3 * ffn * hidden


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _nearest_multiples(
    value: int, size: int, values: range, works: Callable[[int], bool]
) -> list[int]:
    """The multiples of `size` next to `value`, below and above, that are in `values` and work."""
    below = range(value // size * size, values.start - 1, -size)
    above = range(value // size * size + size, values.stop, size)
    found = (next(filter(works, multiples), None) for multiples in (below, above))
    return [multiple for multiple in found if multiple is not None]


def _nearest(value: int, workable: Iterable[int]) -> str:
    """The workable values next below and next above `value`, in words."""
    values = sorted(set(workable))
    below = [v for v in values if v < value][-1:]
    above = [v for v in values if v > value][:1]
    if not below + above:
        return "no other value of it works here"
    return "nearest: " + " or ".join(str(v) for v in below + above)
