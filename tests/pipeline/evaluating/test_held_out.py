"""Held-out figures: those of training's own validation, and those of a count by hand."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data_prep.building.build import build
from data_prep.building.options import BuildOptions
from data_prep.loading.loader import Batch
from data_prep.shard import main as shard
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import train_tokenizer
from model.decoding.generation import generate
from model.errors import ConfigError
from model.hugging_face.loading import load_export
from model.hugging_face.token_bytes import bytes_of_tokens
from model.language_model import MultiTokenModel
from pipeline.config.run_config import RunConfig, load_config
from pipeline.data.validation import ValidationSamples
from pipeline.engine.evaluation import EvalResult, evaluate_heads
from pipeline.evaluating.decoding import Prompting, choose_prompts, decode
from pipeline.evaluating.held_out import HeldOut, Windows, measure
from pipeline.evaluating.model_folder import EvaluatedModel, open_model
from pipeline.evaluating.texts import TextKind, of_files, of_shards
from pipeline.exporting.writing import write_export
from tests.data_prep.conftest import Silence
from tests.support.tiny_export import byte_tokenizer, describe
from tests.support.tiny_llama import save_llama
from tests.support.tiny_model import tiny_config, tiny_weights

CPU = torch.device("cpu")
HEADS = 3


@pytest.fixture(scope="module")
def export(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three heads with the tokenizer of the shards, trained across documents by what it says."""
    return _write(tmp_path_factory.mktemp("evaluated") / "export", shards)


@pytest.fixture(scope="module")
def remembering(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a memory, of segments that do not divide a window."""
    memory = {"segment": 6, "summary": 4, "sensory": 2, "cache": 2}
    return _write(tmp_path_factory.mktemp("remembering") / "export", shards, memory=memory)


def _write(folder: Path, shards: Path, **changes: Any) -> Path:
    config = tiny_config(vocab_size=260, future_tokens=HEADS, **changes)
    write_export(
        folder,
        describe(config, sequence_length=16),
        tiny_weights(config, seed=3).items(),
        tokenizer=(shards / "tokenizer.json").read_bytes(),
    )
    return folder


@pytest.fixture(scope="module")
def model(export: Path) -> EvaluatedModel:
    """The export, loaded."""
    return open_model(export, None, CPU)


def _validation(config: RunConfig, shards: Path, export: Path) -> tuple[EvalResult, int]:
    """What a run's validation says of the same weights, and of how many samples."""
    trained = load_export(export).model
    samples = ValidationSamples(
        config, ShardSet.open(shards, "validation"), data_rank=0, data_size=1
    )
    total = torch.zeros(3 * HEADS, dtype=torch.float64)
    with torch.no_grad():
        for batch in samples:
            total += _sums(trained, batch)
    return EvalResult.from_sums(total), samples.num_samples


def _sums(trained: MultiTokenModel, batch: Batch) -> torch.Tensor:
    return evaluate_heads(
        trained, trained(batch.tokens, documents=batch.documents), batch, chunk_tokens=50
    )


@pytest.mark.parametrize("name", ["export", "remembering"])
def test_figures_are_those_of_training(
    config: Path, shards: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """Losses of all heads and expected tokens per forward, on the same sequences."""
    export = request.getfixturevalue(name)
    model = open_model(export, None, CPU)
    run = load_config(config, ["eval.samples=40"])
    wanted, samples = _validation(run, shards, export)
    assert samples == 40
    assert model.joined
    assert model.window == run.data.sequence_length
    kinds = of_shards(model, shards, "validation", joined=True, max_tokens=40 * 16)
    _, found = measure(model, kinds, Windows(16, 16, max_positions=40 * 16))
    assert found.tokens == [40 * 16] * HEADS
    assert found.losses == pytest.approx(wanted.head_losses, rel=1e-6)
    assert found.tokens_per_forward[-1] == pytest.approx(wanted.tokens_per_forward, rel=1e-12)


def test_figures_are_those_of_training_with_documents_apart(
    config: Path, shards: Path, export: Path, model: EvaluatedModel
) -> None:
    """Whole documents in masked sequences, of training's packing, are documents on their own."""
    run = load_config(
        config,
        [
            *("data.document_mask=true", "data.packing=best_fit", "data.sequence_length=1100"),
            *("eval.samples=1000", "batch.micro_size=2"),
        ],
    )
    wanted, _ = _validation(run, shards, export)
    apart = model._replace(begin=None)  # training puts nothing before a document either
    kinds = of_shards(apart, shards, "validation", joined=False, max_tokens=None)
    assert max(len(stream) for stream in kinds[0].streams) <= 1100
    _, found = measure(apart, kinds, Windows(1100, 1100))
    assert found.losses == pytest.approx(wanted.head_losses, rel=1e-6)


@pytest.mark.parametrize("joined", [True, False])
def test_prompts_are_no_targets(
    config: Path, tmp_path: Path, export: Path, model: EvaluatedModel, joined: bool
) -> None:
    """Completions alone are measured, each head's inside its document, as training validates."""
    lines = [{"q": f"{n} + {n} = ", "a": f"{'so ' * (n % 7)}{2 * n}"} for n in range(300)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = BuildOptions(
        tmp_path / "masked", str(export / "tokenizer.json"), inputs=(tmp_path / "qa.jsonl",),
        validation_fraction=0.3, prompt_key="q", completion_key="a",
    )  # fmt: skip
    build(options, Silence())
    apart = ["data.document_mask=true", "data.packing=one_per_sequence"]
    length = 16 if joined else 64
    settings = [] if joined else apart
    run = load_config(
        config,
        [
            *(f"data.shards={tmp_path / 'masked'}", f"data.sequence_length={length}"),
            *("eval.samples=1000", "batch.micro_size=2", *settings),
        ],
    )
    wanted, samples = _validation(run, tmp_path / "masked", export)
    plain = model._replace(begin=None)
    kinds = of_shards(plain, tmp_path / "masked", "validation", joined=joined, max_tokens=None)
    limit = samples * length if joined else None
    _, found = measure(plain, kinds, Windows(length, length, max_positions=limit))
    assert 0 < found.tokens[2] < 0.9 * sum(len(stream) for stream in kinds[0].streams)
    assert found.losses == pytest.approx(wanted.head_losses, rel=1e-6)
    assert found.tokens_per_forward[-1] == pytest.approx(wanted.tokens_per_forward, rel=1e-12)


def test_a_documents_marks_are_those_of_the_set(
    tmp_path: Path, export: Path, model: EvaluatedModel
) -> None:
    """Also where the model begins each document with a token of its own."""
    (tmp_path / "qa.jsonl").write_text('{"q": "abc", "a": "de"}\n{"q": "f", "a": "ghi"}')
    options = BuildOptions(
        tmp_path / "masked", str(export / "tokenizer.json"), inputs=(tmp_path / "qa.jsonl",),
        validation_fraction=0, prompt_key="q", completion_key="a",
    )  # fmt: skip
    build(options, Silence())
    begun = model._replace(begin=7)
    (kind,) = of_shards(begun, tmp_path / "masked", "train", joined=False, max_tokens=None)
    assert kind.marks is not None
    ends = {len(stream) for stream in kind.streams}
    assert ends == {7, 6}  # the beginning, the text, the end
    for stream, marks in zip(kind.streams, kind.marks, strict=True):
        assert stream[0] == 7
        told = "".join("+" if target else "." for target in marks.targets)
        assert told == {7: "....+++", 6: "..++++"}[len(stream)]
        assert len(set(marks.documents.tolist())) == 1


def _by_hand(
    trained: MultiTokenModel, streams: list[list[int]], windows: Windows, eos: int
) -> HeldOut:
    """The same figures, one position and one target after the other."""
    losses, counts, sizes = ([0.0] * HEADS for _ in range(3))
    compared = 0
    agreed = [0] * HEADS
    for stream in streams:
        last = len(stream) - 1
        for position in range(last):
            # The first window that has it gives it the most context it ever begins with.
            number = max(0, math.ceil((position + 1 - windows.size) / windows.stride))
            start = number * windows.stride
            end = min(start + windows.size, last)
            logits = _logits(trained, tuple(stream[start:end]))
            for head in range(HEADS):
                if position + head + 1 < len(stream):
                    target = stream[position + head + 1]
                    log_probabilities = logits[head, position - start].log_softmax(-1)
                    losses[head] -= float(log_probabilities[target])
                    counts[head] += 1
                    sizes[head] += target != eos
            if end == last or position + HEADS - 1 < end:
                compared += 1
                same = True
                for head in range(HEADS):
                    ahead = position + head - start
                    same = same and position + head < end
                    same = same and bool(
                        logits[head, position - start].argmax() == logits[0, ahead].argmax()
                    )
                    agreed[head] += same
    shares = [count / compared for count in agreed]
    return HeldOut(
        documents=len(streams),
        tokens=[int(count) for count in counts],
        text_bytes=[int(size) for size in sizes],
        losses=[a / b for a, b in zip(losses, counts, strict=True)],
        bits_per_byte=[a / b / math.log(2) for a, b in zip(losses, sizes, strict=True)],
        tokens_per_forward=[1 + sum(shares[1 : head + 1]) for head in range(HEADS)],
    )


@functools.cache
def _logits(trained: MultiTokenModel, tokens: tuple[int, ...]) -> torch.Tensor:
    """`[n, S, V]` of a text on its own."""
    with torch.no_grad():
        trunk_output = trained(torch.tensor([tokens]))
        context = trained.heads_context(trunk_output)
        return torch.stack(
            [
                trained.logits(trained.heads.hidden(head, trunk_output, context))[:, 0]
                for head in range(1, HEADS + 1)
            ]
        )


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [
        *(("export", 8, 8), ("export", 8, 3), ("export", 8, 1)),
        *(("remembering", 8, 3), ("remembering", 25, 25), ("remembering", 1000, 1000)),
    ],
)
def test_windows_count_every_target_once(
    name: str, size: int, stride: int, request: pytest.FixtureRequest
) -> None:
    """Long and short streams, with windows that overlap or do not; also one token alone."""
    export = request.getfixturevalue(name)
    model = open_model(export, None, CPU)
    trained = load_export(export).model
    generator = np.random.default_rng(stride)
    streams = [
        [*generator.integers(97, 107, length).tolist(), 256] for length in (30, 8, 7, 1, 2, 17, 0)
    ]
    windows = Windows(size, stride)
    kind = TextKind("made up", len(streams), [np.array(s, np.uint16) for s in streams])
    by_kind, total = measure(model, [kind], windows)
    assert by_kind == {"made up": total}
    wanted = _by_hand(trained, streams, windows, eos=256)
    for found, value in zip(total, wanted, strict=True):
        assert found == pytest.approx(value, rel=1e-5)
    everything = sum(len(stream) for stream in streams)
    assert total.tokens == [
        everything - sum(min(len(s), head) for s in streams) for head in (1, 2, 3)
    ]


def test_all_kinds_weigh_by_their_targets(model: EvaluatedModel) -> None:
    """The mean over everything is that of one kind with everything in it."""
    texts = [np.array([97, 98, 99, 256], np.uint16), np.array([100] * 40, np.uint16)]
    windows = Windows(8, 8)
    apart = [TextKind(str(number), 1, [text]) for number, text in enumerate(texts)]
    _, of_two = measure(model, apart, windows)
    _, of_one = measure(model, [TextKind("both", 2, texts)], windows)
    for found, value in zip(of_two, of_one, strict=True):
        assert found == pytest.approx(value, rel=1e-6)


def test_files_and_their_kinds(tmp_path: Path, model: EvaluatedModel) -> None:
    """A line's key names its kind, else the file does; ends of documents are in the stream."""
    (tmp_path / "a.jsonl").write_text(
        '{"text": "ab", "source": "x"}\n\n{"text": "c"}\n{"text": "", "source": "x"}\n'
        '{"text": "d", "source": "x"}\n'
    )
    (tmp_path / "b.txt").write_text("é\n")
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    keys = {"text_key": "text", "kind_key": "source"}
    kinds = of_files(model, files, joined=True, **keys)
    spelled = {
        kind.name: model.tokenizer.decode(kind.streams[0].tolist(), skip_special_tokens=False)
        for kind in kinds
    }
    end = "<|endoftext|>"
    assert spelled == {"x": f"ab{end}d{end}", "a.jsonl": f"c{end}", "b.txt": f"é\n{end}"}
    apart = of_files(model, files, joined=False, **keys)
    assert [len(kind.streams) for kind in apart] == [2, 1, 1]
    assert all(stream[0] == model.begin for kind in apart for stream in kind.streams)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1}\n', "line 2 has no text under 'text', only txt"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b"{\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a", "source": 3}\n', "--kind-key"),
        ("a.txt", b"\xff\xfe", "give UTF-8 text"),
        ("a.txt.gz", b"no gzip", "compressed data is damaged"),
        ("absent.txt", None, "No such file"),
    ],
)
def test_bad_files_are_named(
    name: str, content: bytes | None, message: str, tmp_path: Path, model: EvaluatedModel
) -> None:
    """With the line and the key."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        of_files(model, [path], joined=True, text_key="text", kind_key="source")
    assert str(path) in str(error.value)


def test_shards_of_another_tokenizer_are_refused(shards: Path, model: EvaluatedModel) -> None:
    """Their ids would mean something else."""
    other = model._replace(tokenizer=Tokenizer.from_str(byte_tokenizer().decode()))
    with pytest.raises(ConfigError, match="another tokenizer"):
        of_shards(other, shards, "validation", joined=True, max_tokens=None)


def test_an_empty_split_is_named(tmp_path: Path, model: EvaluatedModel) -> None:
    """Of one document, none is held out."""
    (tmp_path / "a.txt").write_text("one document")
    output = tmp_path / "set"
    arguments = ["--input", str(tmp_path / "a.txt"), "--output", str(output), "--workers", "1"]
    assert shard([*arguments, "--tokenizer", "bytes", "--validation-fraction", "0.001"]) == 0
    with pytest.raises(ConfigError, match=r"--split validation of .* holds no document"):
        of_shards(model, output, "validation", joined=True, max_tokens=None)


def test_tokens_spell_the_bytes_of_a_text() -> None:
    """Exactly, also where a character is several tokens; special tokens spell nothing."""
    text = "def f(x):\n    return 'größe 漢字 🙂'  # naïve\n"
    content = train_tokenizer([text * 3, "and some other words"], 300)
    tokenizer = Tokenizer.from_str(content.decode())
    sizes = bytes_of_tokens(tokenizer, 310)
    assert len(sizes) == 310
    for sample in (text, "🙂", "\x00 ~"):
        ids = tokenizer.encode(sample).ids
        assert sum(sizes[token] for token in ids) == len(sample.encode())
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end is not None
    assert sizes[end] == 0


def test_decoding_is_that_of_generate(shards: Path, model: EvaluatedModel) -> None:
    """Same prompts, same counts; and the text is what head 1 gives alone."""
    kinds = of_shards(model, shards, "validation", joined=True, max_tokens=4000)
    prompting = Prompting(prompts=5, prompt_tokens=8, new_tokens=20)
    found = decode(model, kinds, prompting)[kinds[0].name]
    prompts = choose_prompts(kinds[0].streams, prompting)
    assert len(prompts) == found.prompts == 5
    assert {len(prompt) for prompt in prompts} == {8}
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_id": model.end}
    result = generate(model.network, prompts, heads=HEADS, **options)
    assert found.tokens == result.num_tokens
    assert found.tokens_per_forward == result.tokens_per_forward
    assert result.tokens == generate(model.network, prompts, heads=1, **options).tokens
    later = [len(block) for blocks in result.blocks for block in blocks[1:]]
    assert found.tokens_per_forward == sum(later) / len(later)


def test_prompts_are_spread_over_the_text() -> None:
    """Pieces of all streams; none of one that is shorter than a prompt."""
    streams = [np.arange(10), np.arange(3), np.arange(100, 105)]
    prompting = Prompting(prompts=3, prompt_tokens=5, new_tokens=1)
    assert choose_prompts(streams, prompting) == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [100, 101, 102, 103, 104],
    ]
    assert choose_prompts([np.arange(4)], prompting) == []


def test_a_plain_llama_is_evaluated(tmp_path: Path) -> None:
    """By its own loss in transformers; it begins a text and has one head."""
    llama = save_llama(tmp_path, bos_token_id=257, eos_token_id=[256, 258], dtype=torch.float32)
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer())
    model = open_model(tmp_path, None, CPU)
    assert (model.begin, model.end, model.joined, model.positions) == (257, 256, False, 128)
    kinds = of_files(model, [Path(__file__)], joined=False, text_key="text", kind_key="source")
    stream = kinds[0].streams[0][:100]
    _, found = measure(model, [kinds[0]._replace(streams=[stream])], Windows(128, 128))
    ids = torch.from_numpy(stream.astype(np.int64))[None]
    with torch.no_grad():
        wanted = float(llama(ids, labels=ids).loss)
    assert found.losses == pytest.approx([wanted], rel=1e-5)
    assert found.text_bytes == [99]
    assert found.tokens_per_forward == [1.0]
