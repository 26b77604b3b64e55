"""Forests of drafts: their shape, what is cut away, and that a forward over one is many."""

import random

import torch

from model.inference.network import Network
from model.inference.prefill import prefill
from model.joint_decoding.forest import Forest, move_path
from tests.support.tiny_model import tiny_config, tiny_network

ROWS, LAYERS, WIDTH = 3, 3, 4
LENGTHS = (1, 9, 5)


def grown() -> Forest:
    """Three layers of four nodes below each root, of random parents in the layer before."""
    generator = torch.Generator().manual_seed(2)

    def numbers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (ROWS, WIDTH), generator=generator)

    forest = Forest.of_roots(numbers(0, 20)[:, 0], torch.float64)
    for layer in range(LAYERS):
        first = 1 + WIDTH * (layer - 1)
        parents = numbers(first, first + WIDTH) if layer else torch.zeros_like(numbers(0, 1))
        forest = forest.grown(parents, numbers(0, 20), -torch.rand(ROWS, WIDTH).double())
    return forest


def line_of(forest: Forest, row: int, node: int) -> list[int]:
    """A node's ancestors from the root on, and itself, by its parents alone."""
    line = [node]
    while line[0]:
        line.insert(0, int(forest.parents[row, line[0]]))
    return line


def test_ancestors_depths_and_paths_follow_the_parents() -> None:
    """Each node's line is found by walking up; a path goes straight on after its end."""
    forest = grown()
    for row in range(ROWS):
        for node in range(forest.size):
            line = line_of(forest, row, node)
            assert forest.ancestors[row, node].nonzero().flatten().tolist() == sorted(line)
            assert int(forest.depths[row, node]) == len(line) - 1
            [path] = Forest(*(part[row : row + 1] for part in forest)).path_to(
                torch.tensor([node]), LAYERS
            )
            assert path.tolist() == [*line, *range(len(line), LAYERS + 1)]


def test_sums_along_a_line_leave_the_root_out() -> None:
    """Infinite values of other lines do not matter."""
    forest = grown()
    values = torch.arange(float(forest.size)).repeat(ROWS, 1)
    values[:, 1] = -torch.inf
    sums = forest.along(values)
    for row in range(ROWS):
        for node in range(forest.size):
            expected = sum(values[row, n].item() for n in line_of(forest, row, node)[1:])
            assert sums[row, node].item() == expected


def test_a_cut_keeps_the_lines_of_its_leaves() -> None:
    """Nodes that are shared are kept once; rows that need fewer have nodes that are none."""
    forest = grown()
    forest.scores[0, -1] = -torch.inf
    leaves = torch.tensor([[9, forest.size - 1], [10, 11], [2, 2]])
    smaller, origins = forest.cut_to(leaves)
    sizes = []
    for row in range(ROWS):
        wanted = set()
        for leaf in leaves[row].tolist():
            if forest.scores[row, leaf] > -torch.inf:
                wanted |= set(line_of(forest, row, leaf))
        there = (smaller.scores[row] > -torch.inf).nonzero().flatten().tolist()
        assert origins[row, there].tolist() == sorted(wanted)
        assert there == list(range(len(wanted)))
        sizes.append(len(wanted))
        for node in there:
            origin = int(origins[row, node])
            assert origins[row, line_of(smaller, row, node)].tolist() == line_of(
                forest, row, origin
            )
            assert smaller.tokens[row, node] == forest.tokens[row, origin]
            assert smaller.scores[row, node] == forest.scores[row, origin]
            seen = smaller.ancestors[row, node].nonzero().flatten()
            assert origins[row, seen].tolist() == sorted(line_of(forest, row, origin))
    assert smaller.size == max(sizes)
    assert len(set(sizes)) == ROWS


@torch.no_grad()
def alone(network: Network, text: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of head 1 after a text that is read by itself, and the cache that it leaves."""
    cache = network.new_cache(1, 64)
    logits = prefill(network, cache, torch.tensor([text]), torch.tensor([len(text)]), 1)
    return logits[0, 0], cache.buffers


@torch.no_grad()
def test_j7_a_forward_over_a_forest_is_one_over_each_line() -> None:
    """Logits at every node are those after its line; a moved path is as if it had been read."""
    network, forest, chance = tiny_network(tiny_config()), grown(), random.Random(1)
    texts = [[chance.randrange(20) for _ in range(length)] for length in LENGTHS]
    cache = network.new_cache(ROWS, 64)
    padded = torch.tensor([[*text, *[0] * (max(LENGTHS) - len(text))] for text in texts])
    prefill(network, cache, padded, torch.tensor(LENGTHS), 1)
    nodes = torch.arange(forest.size).repeat(ROWS, 1)
    block = forest.block(network, cache, nodes, 64)
    output = network.fill_heads(network.trunk(forest.tokens, cache, block), 1, cache, block)
    logits = network.logits(network.heads(output, 1, 1, cache, block)[0])
    logits = logits.unflatten(0, forest.tokens.shape)
    for row, text in enumerate(texts):
        for node in range(forest.size):
            line = forest.tokens[row, line_of(forest, row, node)].tolist()
            expected, _ = alone(network, text + line)
            torch.testing.assert_close(logits[row, node], expected)
    move_path(cache, forest.path_to(torch.tensor([12, 0, 7]), LAYERS))
    for row, (text, node) in enumerate(zip(texts, (12, 0, 7), strict=True)):
        whole = text + forest.tokens[row, line_of(forest, row, node)].tolist()
        _, buffers = alone(network, whole)
        for kept, expected in zip(cache.buffers, buffers, strict=True):
            groups = network.config.kv_heads  # of the heads' layer those of head 1
            torch.testing.assert_close(
                kept[row, : len(whole), :, :groups], expected[0, : len(whole), :, :groups]
            )
