"""Who drafts beams: a second model, or the model's own heads.

Legend: R rows, k heads in use, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from model.beams.forest import ForestReader, NodesRead, Place, Tree
from model.inference.network import Network


class Drafter(Protocol):
    """Says what may follow the nodes of trees, before the model does."""

    @property
    def depth(self) -> int:
        """Layers that it drafts, at most."""
        ...

    @property
    def heads(self) -> int:
        """How many of the model's have to note their keys and values."""
        ...

    @property
    def forwards(self) -> int:
        """Of a second model."""
        ...

    def read(self, prompts: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Read the prompts; `logits` `[heads, prompts, V]` are the model's after them."""
        ...

    def begin(self, rows: Sequence[int]) -> None:
        """After `read`: row i goes on with the prompt of row `rows[i]`."""
        ...

    def roots(self, before: Sequence[int], trees: Sequence[Tree]) -> Tensor:
        """`[R, V]` logits after the roots.

        Args:
            before: of each row the token before its root.
            trees: of each row, its root alone.
        """
        ...

    def nodes(
        self, trees: Sequence[Tree], starts: Sequence[int], places: Sequence[Place]
    ) -> Tensor:
        """`[places, V]` logits after some nodes of the last layer.

        Args:
            trees: of each row.
            starts: of each row, the first node of that layer.
            places: of that layer.
        """
        ...

    def take(
        self, trees: Sequence[Tree], places: Sequence[Place], reader: ForestReader, read: NodesRead
    ) -> None:
        """Row i goes on at `places[i]`.

        Args:
            trees: of each row before.
            places: of rows before.
            reader: of the model, its rows after.
            read: what the model's forward gave.
        """
        ...


class ModelDrafter:
    """A second model of the same vocabulary drafts, a forward for each layer.

    Args:
        network: the second model; its head 1 alone is used.
        rows: how many beams of all texts there may be at once.
        capacity: tokens that a row may have, its tree's nodes among them.
        depth: layers that it drafts.
    """

    heads = 1

    def __init__(self, network: Network, rows: int, capacity: int, depth: int) -> None:
        self.depth = depth
        self.reader = ForestReader(network, rows, capacity)

    @property
    def forwards(self) -> int:
        """Those that were made."""
        return self.reader.forwards

    def read(self, prompts: Sequence[Sequence[int]], logits: Tensor) -> None:
        """It reads the prompts itself."""
        self.reader.read(prompts)

    def begin(self, rows: Sequence[int]) -> None:
        """Copies the prompts' keys and values."""
        self.reader.take(rows)

    def roots(self, before: Sequence[int], trees: Sequence[Tree]) -> Tensor:
        """Reads the token before each root once more: a draft of the last layer it has not read."""
        return self.reader.read_last_two(before, [tree.tokens[0] for tree in trees])

    def nodes(
        self, trees: Sequence[Tree], starts: Sequence[int], places: Sequence[Place]
    ) -> Tensor:
        """One forward over the layer."""
        return self.reader.read_nodes(trees, starts).at(places)

    def take(
        self, trees: Sequence[Tree], places: Sequence[Place], reader: ForestReader, read: NodesRead
    ) -> None:
        """Copies the same paths; of nodes of the last layer it has no keys and values yet."""
        self.reader.take_paths(trees, places)


class HeadsDrafter:
    """The model's own heads draft: head d + 1 says what comes d tokens after the beam's last one.

    It says so without knowing the tokens between, so nodes of one tree and depth have one
    distribution, and the probability of a path is the product of its heads'.

    Args:
        heads: k.
    """

    forwards = 0

    def __init__(self, heads: int) -> None:
        assert heads >= 2, heads
        self.heads = heads
        self.depth = heads - 1
        self._logits: Tensor  # [k - 1, R, V]

    def read(self, prompts: Sequence[Sequence[int]], logits: Tensor) -> None:
        """The heads have said what they say when the prompts were read."""
        self._logits = logits[1:]

    def begin(self, rows: Sequence[int]) -> None:
        """Rows of one prompt have the same drafts."""
        self._logits = self._logits[:, list(rows)]

    def roots(self, before: Sequence[int], trees: Sequence[Tree]) -> Tensor:
        """What head 2 says."""
        return self._logits[0]

    def nodes(
        self, trees: Sequence[Tree], starts: Sequence[int], places: Sequence[Place]
    ) -> Tensor:
        """What the next head says, of the tree alone."""
        depth = len(trees[places[0].row].lines[places[0].node]) - 1
        return self._logits[depth, [place.row for place in places]]

    def take(
        self, trees: Sequence[Tree], places: Sequence[Place], reader: ForestReader, read: NodesRead
    ) -> None:
        """Heads 2 .. k run where the rows end now."""
        self._logits = reader.last_heads(read.states_at(places), self.heads)
