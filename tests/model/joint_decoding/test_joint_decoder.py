"""Joint decoding with real models: against a slow loop that has no cache, tree or batch."""

import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from model.decoding.batch import Batch, Request
from model.decoding.chain import RowOptions
from model.decoding.generation import Generation, collect, generate, stream
from model.decoding.sampling import GREEDY, Sampling
from model.inference.cache import Cache
from model.inference.network import Network
from model.inference.prefill import prefill
from model.joint_decoding.decoder import JointDecoder
from model.joint_decoding.draft_model import JointModelDecoder
from model.joint_decoding.rule import JointRule
from tests.model.decoding.test_chain import chi_square
from tests.support.head_variants import VARIANTS
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts, tiny_weights

EOS, LIMIT, DRAFTS = 6, 14, 3
RULES = {
    "one beam": JointRule(1, 1, 0.3),
    "the best of four": JointRule(4, 1, 0.3),
    "four candidates": JointRule(4, 4, 0.3),
    "two of twelve": JointRule(12, 2, 0.1),
    "all is kept": JointRule(2, 1, 0),
}


@functools.cache
def network(vocab_size: int = 20) -> Network:
    """The target, with four heads."""
    return tiny_network(tiny_config(vocab_size=vocab_size))


@functools.cache
def drafter(vocab_size: int = 20) -> Network:
    """A smaller model that agrees with the target now and then: it has its embedding, LM head."""
    config = tiny_config(vocab_size=vocab_size, layers=3, future_tokens=1)
    weights = tiny_weights(config, seed=3)
    shared = tiny_weights(tiny_config(vocab_size=vocab_size))
    weights |= {name: shared[name] for name in weights if weights[name].shape[0] == vocab_size}
    return tiny_network(config, weights)


def decoder(kind: str, rule: JointRule, sampling: Sampling = GREEDY) -> JointDecoder:
    """A decoder whose drafts come from the heads, or from a model."""
    if kind == "heads":
        return JointDecoder(network(), heads=DRAFTS + 1, rule=rule, eos_id=EOS, sampling=sampling)
    return JointModelDecoder(
        network(),
        drafter=network() if kind == "itself" else drafter(),
        drafts=DRAFTS,
        rule=rule,
        eos_id=EOS,
        sampling=sampling,
    )


def decode(way: JointDecoder, limit: int = LIMIT, eos_id: int | None = EOS) -> Generation:
    """Continue the tiny prompts, whose texts end at different places."""
    pieces = stream(way, tiny_prompts(), max_new_tokens=limit, eos_id=eos_id)
    return collect(pieces, len(tiny_prompts()))


@torch.no_grad()
def said(model: Network, text: Sequence[int], heads: int = 1) -> Tensor:
    """Logarithmic probabilities `[M, V]` of heads after a text that is read anew."""
    cache = model.new_cache(1, len(text))
    found = prefill(model, cache, torch.tensor([list(text)]), torch.tensor([len(text)]), heads)
    return torch.log_softmax(found[:, 0], dim=-1)


def slow_text(kind: str, rule: JointRule, prompt: list[int]) -> list[list[int]]:
    """Blocks of one text by the published steps, on whole texts that are read anew."""
    block = [int(said(network(), prompt)[0].argmax())]
    text, blocks = [*prompt, *block], [block]
    while EOS not in text[len(prompt) :] and len(text) - len(prompt) < LIMIT:
        offers = said(network(), text[:-1], DRAFTS + 1)[1:]
        beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        scores: dict[tuple[int, ...], float] = {}
        for layer in range(DRAFTS):
            longer = [beam for beam in beams if EOS in beam[1]]
            for score, path in beams:
                if EOS not in path:
                    model = network() if kind == "itself" else drafter()
                    after = offers[layer] if kind == "heads" else said(model, [*text, *path])[0]
                    longer += [(score + s, (*path, t)) for t, s in enumerate(after.tolist())]
            beams = sorted(longer, reverse=True)[: rule.width]
            scores |= {path: score for score, path in beams}
        best = [path for _, path in beams[: rule.candidates]]
        nodes = {path[: d + 1] for path in best for d in range(len(path))}
        likely: dict[tuple[int, ...], float] = {(): 0.0}
        for path in sorted(nodes, key=len):
            after = said(network(), [*text, *path[:-1]])[0]
            likely[path] = likely[path[:-1]] + float(after[path[-1]])
        largest = {len(p): max(scores[q] for q in nodes if len(q) == len(p)) for p in nodes}
        passing = [
            path
            for path in nodes
            if min(1.0, float(torch.tensor(likely[path] - largest[len(path)]).exp()))
            > rule.threshold
        ]
        kept = max(passing, key=lambda path: (len(path), likely[path]), default=())
        block = [*kept, int(said(network(), [*text, *kept])[0].argmax())]
        text, blocks = text + block, [*blocks, block]
    return blocks


def cut(blocks: list[list[int]]) -> list[list[int]]:
    """Blocks up to the end of the text or the limit."""
    left, result = LIMIT, []
    for block in blocks:
        whole = block[:left]
        whole = whole[: whole.index(EOS) + 1] if EOS in whole else whole
        result.append(whole)
        left -= len(whole)
    return [block for block in result if block]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["heads", "model"])
def test_texts_are_those_of_the_slow_loop(kind: str, rule: str) -> None:
    """Block by block, over rows of different lengths that end within drafts and at the limit."""
    found = decode(decoder(kind, RULES[rule]))
    assert found.blocks == [cut(slow_text(kind, RULES[rule], p)) for p in tiny_prompts()]
    sizes = {len(block) for blocks in found.blocks for block in blocks}
    assert sizes >= {1, 2} or rule == "all is kept"
    assert any(text[-1] == EOS for text in found.tokens)
    assert any(len(text) == LIMIT for text in found.tokens)


@pytest.mark.parametrize("kind", ["heads", "model"])
def test_j1_tau_one_is_plain_decoding(kind: str) -> None:
    """Greedy texts are those of head 1, a token for each forward."""
    plain = generate(network(), tiny_prompts(), heads=1, max_new_tokens=LIMIT, eos_id=EOS)
    found = decode(decoder(kind, JointRule(4, 4, 1)))
    assert found.blocks == plain.blocks


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.2, top_k=8)])
def test_j4_a_model_accepts_its_own_drafts(sampling: Sampling) -> None:
    """With one beam P = Q up to rounding, so that all is kept, greedily and sampled."""
    found = decode(decoder("itself", JointRule(1, 1, 0.999), sampling))
    assert all(len(block) == DRAFTS + 1 for text in found.blocks for block in text[1:-1])
    if sampling.greedy:
        plain = generate(network(), tiny_prompts(), heads=1, max_new_tokens=LIMIT, eos_id=EOS)
        assert found.tokens == plain.tokens


def test_a_smaller_limit_cuts_the_same_text() -> None:
    """What is drafted does not depend on how much room is left."""
    long = decode(decoder("heads", RULES["four candidates"]), 20)
    for limit in (1, 7, 13):
        short = decode(decoder("heads", RULES["four candidates"]), limit)
        assert short.tokens == [text[:limit] for text in long.tokens]


@torch.no_grad()
def check_cache(cache: Cache, row: int, model: Network, text: list[int], heads: int) -> None:
    """Keys and values of a row are those of a text that is read at once."""
    fresh = model.new_cache(1, 128)
    prefill(model, fresh, torch.tensor([text]), torch.tensor([len(text)]), heads)
    for number, (kept, expected) in enumerate(zip(cache.buffers, fresh.buffers, strict=True)):
        groups = model.config.kv_heads * (heads if number == model.config.trunk_layers else 1)
        torch.testing.assert_close(
            kept[row, : len(text), :, :groups], expected[0, : len(text), :, :groups]
        )


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, repetition_penalty=1.3)])
@pytest.mark.parametrize("kind", ["heads", "model"])
def test_caches_are_those_of_fresh_prefills(kind: str, sampling: Sampling) -> None:
    """After whatever was kept of whatever beam, in every layer and row, and in both models."""
    way = decoder(kind, JointRule(4, 3, 0.1), sampling)
    texts = [list(prompt) for prompt in tiny_prompts()]
    step, sizes = way.prefill(tiny_prompts(), 80), set()
    for _ in range(12):
        for row, (text, new) in enumerate(zip(texts, step.tokens, strict=True)):
            text.extend(new)
            assert int(way.cache.lengths[row]) == len(text) - 1
            heads = DRAFTS + 1 if kind == "heads" else 1
            check_cache(way.cache, row, network(), text[:-1], heads)
            if isinstance(way, JointModelDecoder) and text[:-2]:
                # The last token but one is read once more with the next drafts.
                check_cache(way.drafter_cache, row, drafter(), text[:-2], 1)
        step = way.step()
        sizes |= {len(new) for new in step.tokens}
    assert sizes == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", VARIANTS)
def test_heads_of_every_kind_draft(kind: str) -> None:
    """The cache of heads that read one another is right, too: tau 1 gives the plain text."""
    config = tiny_config(layers=9, **VARIANTS[kind])
    model = tiny_network(config)
    plain = generate(model, tiny_prompts(), heads=1, max_new_tokens=12)
    for threshold, same in ((1.0, True), (0.0, False)):
        way = JointDecoder(model, heads=4, rule=JointRule(3, 3, threshold), eos_id=EOS)
        found = collect(stream(way, tiny_prompts(), max_new_tokens=12), len(tiny_prompts()))
        assert (found.tokens == plain.tokens) == same


SAMPLINGS = (
    GREEDY,
    Sampling(temperature=1.1),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=0.8, top_k=3),
    Sampling(temperature=1.4, top_p=0.7, repetition_penalty=1.2),
)


@pytest.mark.parametrize("kind", ["heads", "model"])
def test_rows_join_leave_and_get_what_they_get_alone(kind: str) -> None:
    """Greedy and sampled rows of different lengths, two at once of five that come."""
    requests = {
        row: Request(prompt, 10 + row, EOS, None, RowOptions(SAMPLINGS[row], 70 + row))
        for row, prompt in enumerate(tiny_prompts())
    }

    def run(numbers: Sequence[int], rows: int) -> dict[int, list[list[int]]]:
        batch = Batch(decoder(kind, JointRule(4, 2, 0.3)), rows, 60)
        waiting, blocks = list(numbers), {number: list[list[int]]() for number in numbers}
        while waiting or batch.rows:
            joining = [waiting.pop(0) for _ in range(min(rows - len(batch.rows), len(waiting)))]
            pieces = batch.join({n: requests[n] for n in joining}) if joining else []
            for piece in pieces + (batch.step() if batch.rows else []):
                blocks[piece.row].append(piece.tokens)
        return blocks

    together = run(list(requests), 2)
    assert any(len(block) > 1 for blocks in together.values() for block in blocks)
    assert together == {k: v for number in requests for k, v in run([number], 1).items()}


def test_the_number_of_heads_may_change_at_any_step() -> None:
    """One head drafts nothing, more of them do again; at tau 1 texts stay those of head 1."""
    for threshold in (1.0, 0.0):
        way = decoder("heads", JointRule(4, 2, threshold))
        texts = way.prefill(tiny_prompts(), 40).tokens
        sizes = []
        for heads in (4, 1, 1, 3, 2, 4, 4):
            way.use_heads(heads)
            for row, new in enumerate(way.step().tokens):
                texts[row] += new
                sizes.append(len(new))
        for row, (prompt, text) in enumerate(zip(tiny_prompts(), texts, strict=True)):
            check_cache(way.cache, row, network(), [*prompt, *text[:-1]], DRAFTS + 1)
        plain = generate(network(), tiny_prompts(), heads=1, max_new_tokens=8)
        assert ([text[:8] for text in texts] == plain.tokens) == (threshold == 1)
        assert (max(sizes) > 1) == (threshold == 0)


@functools.cache
def said_of_four(model: Callable[[int], Network], text: tuple[int, ...]) -> Tensor:
    """What a model of four tokens says after a text."""
    return said(model(4), text)[0]


def law(rule: JointRule, temperature: float) -> Tensor:
    """Of three tokens after a prompt, `[V ** 3]`, with one beam of two drafts: all branches."""
    vocabulary = range(4)
    total = torch.zeros(4, 4, 4, dtype=torch.float64)

    def after(model: Callable[[int], Network], text: tuple[int, ...]) -> list[float]:
        return torch.softmax(said_of_four(model, text) / temperature, dim=-1).tolist()

    for first, a, b in itertools.product(vocabulary, repeat=3):
        begin = (1, 2, first)
        q = [after(drafter, begin)[a], after(drafter, (*begin, a))[b]]
        p = [after(network, begin)[a], after(network, (*begin, a))[b]]
        chance = after(network, (1, 2))[first] * q[0] * q[1]
        ratios = [p[0] / q[0], p[0] * p[1] / (q[0] * q[1])]
        kept = max([i for i, r in enumerate(ratios, 1) if min(1, r) > rule.threshold], default=0)
        if kept == 2:
            total[first, a, b] += chance
            continue
        for second, third in itertools.product(vocabulary, repeat=2):
            if kept == 1 and second == a:
                total[first, a, third] += chance * after(network, (*begin, a))[third]
            if kept == 0:  # one more iteration, of which only its first token counts
                share = chance * after(network, begin)[second]
                for c, d in itertools.product(vocabulary, repeat=2):
                    text = (*begin, second)
                    q1, q2 = after(drafter, text)[c], after(drafter, (*text, c))[d]
                    p1, p2 = after(network, text)[c], after(network, (*text, c))[d]
                    passes = max(min(1, p1 / q1), min(1, p1 * p2 / (q1 * q2))) > rule.threshold
                    token = float(c == third) if passes else after(network, text)[third]
                    total[first, second, third] += share * q1 * q2 * token
    return total.flatten()


def test_sampled_texts_have_the_law_of_the_published_steps() -> None:
    """Counts fit all branches added up; they do not fit plain sampling, as it is lossy."""
    rule, rows = JointRule(1, 1, 0.2), 2500
    way = JointModelDecoder(
        network(4), drafter=drafter(4), drafts=2, rule=rule, sampling=Sampling(temperature=1.2)
    )
    found = collect(stream(way, [[1, 2]] * rows, max_new_tokens=3), rows)
    codes = torch.tensor(found.tokens) @ torch.tensor([16, 4, 1])
    counts = torch.bincount(codes, minlength=64).double()
    expected = law(rule, 1.2)
    assert abs(float(expected.sum()) - 1) < 1e-9
    assert abs(chi_square(counts, expected)) < 5
    assert chi_square(counts, law(JointRule(1, 1, 1), 1.2)) > 10


def test_sampled_beams_differ_by_seed_and_repeat_with_it() -> None:
    """Beams of several are drawn by the row's numbers, none twice."""
    sampling = Sampling(temperature=1.5)

    def texts(first_seed: int) -> list[list[int]]:
        way = JointDecoder(
            network(),
            heads=4,
            rule=JointRule(4, 4, 0.2),
            sampling=sampling,
            seeds=range(first_seed, first_seed + 5),
        )
        return collect(stream(way, tiny_prompts(), max_new_tokens=12), 5).tokens

    assert texts(3) == texts(3) != texts(30)


def test_drafts_outside_the_targets_top_k_are_not_kept() -> None:
    """The target's distribution is cut before ratios: with its likeliest token alone, no other."""
    sampling = Sampling(temperature=1.0, top_k=1)
    plain = generate(network(), tiny_prompts(), heads=1, max_new_tokens=LIMIT, eos_id=EOS)
    for kind in ("heads", "model"):
        found = decode(decoder(kind, JointRule(4, 4, 1e-9), sampling))
        assert found.tokens == plain.tokens


def test_counts_are_those_of_what_ran() -> None:
    """A forward of the drafter for each draft and one for the prompts; none of heads."""
    for kind, forwards in (("heads", 0), ("model", 1)):
        way = decoder(kind, RULES["all is kept"])
        found = decode(way, eos_id=None)
        steps = found.forwards - 1
        assert way.draft_forwards == forwards * (1 + DRAFTS * steps)
        assert way.tried[0] == sum(len(blocks) - 1 for blocks in found.blocks)
        assert sorted(way.tried, reverse=True) == way.tried
