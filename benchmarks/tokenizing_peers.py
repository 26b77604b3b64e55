"""The other ways to tokenize a .jsonl file, each run in a process of its own by data_prep.py.

Each peer is written as its own documentation shows it, uses as many threads or processes as it is
told, puts one EOS behind each document and stores the ids; OUT is a folder.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

# Each peer imports what it needs by itself, so that the imports of others do not count for it.

EOS = "<|endoftext|>"
LINES_AT_ONCE = 1000


def tokenizers_floor(corpus: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """`tokenizers` alone, its own threads, and one Arrow file."""
    del workers  # its threads are set from outside, by RAYON_NUM_THREADS
    import numpy as np
    import pyarrow as pa
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    backend.encode_special_tokens = True
    eos = backend.token_to_id(EOS)
    assert eos is not None, f"{tokenizer} has no {EOS}"
    schema = pa.schema([("tokens", pa.large_list(pa.uint16()))])
    with corpus.open("rb") as lines, pa.ipc.new_file(str(out / "all.arrow"), schema) as writer:
        for texts in _batches(lines):
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
            rows = [np.array([*encoding.ids, eos], dtype=np.uint16) for encoding in encoded]
            ends = np.cumsum([len(row) for row in rows])
            flat = pa.array(np.concatenate(rows))
            offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
            column = pa.LargeListArray.from_arrays(offsets, flat)
            writer.write_batch(pa.record_batch([column], schema=schema))


def gigatoken_bare(corpus: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """The reader and encoder of gigatoken itself, all in memory, and one Arrow file."""
    import gigatoken
    import numpy as np
    import pyarrow as pa

    layout = json.loads(tokenizer.read_bytes())
    eos = next(token["id"] for token in layout["added_tokens"] if token["content"] == EOS)
    layout["added_tokens"] = []
    backend = gigatoken.Tokenizer.from_json(json.dumps(layout))
    encoded = backend.encode_files(gigatoken.JsonlFileSource([str(corpus)]), parallel=workers > 1)
    ids = np.asarray(encoded.layout.content.data)
    ends = np.asarray(encoded.layout.offsets.data)[1:]
    positions = ends + np.arange(len(ends))
    is_text = np.ones(len(ids) + len(ends), dtype=bool)
    is_text[positions] = False
    flat = np.empty(len(is_text), dtype=np.uint16)
    flat[is_text] = ids
    flat[positions] = eos
    offsets = np.concatenate([[0], positions + 1])
    column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat))
    schema = pa.schema([("tokens", pa.large_list(pa.uint16()))])
    with pa.ipc.new_file(str(out / "all.arrow"), schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))


def hf_datasets(corpus: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """`datasets`: load, map in batches over processes, save to disk."""
    import datasets
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    backend.encode_special_tokens = True
    eos = backend.token_to_id(EOS)
    assert eos is not None, f"{tokenizer} has no {EOS}"

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"tokens": [[*encoding.ids, eos] for encoding in encoded]}

    loaded = datasets.load_dataset(
        "json", data_files=str(corpus), split="train", cache_dir=str(out / "cache")
    )
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"))})
    mapped = loaded.map(
        encode, batched=True, remove_columns=["text"], features=features, num_proc=workers
    )
    mapped.save_to_disk(str(out / "saved"))


def datatrove(corpus: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """DocumentTokenizer of datatrove, one task and process per part of the corpus."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    # It spreads whole files over tasks, so it gets one file per worker.
    parts = out / "parts"
    parts.mkdir()
    with corpus.open("rb") as lines:
        files = [(parts / f"{number}.jsonl").open("wb") for number in range(workers)]
        for number, line in enumerate(lines):
            files[number % workers].write(line)
        for file in files:
            file.close()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(parts)),
            DocumentTokenizer(
                output_folder=str(out / "tokens"),
                tokenizer_name_or_path=str(tokenizer),
                eos_token=EOS,
                shuffle_documents=False,
            ),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(out / "logs"),
    ).run()


def megatron(corpus: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """Megatron-LM's preprocess_data.py, from a checkout of it on the path."""
    spec = find_spec("tools.preprocess_data")
    assert spec is not None, "megatron_is_there was asked first"
    assert spec.origin is not None, "it is a file"
    command = [sys.executable, spec.origin, "--input", str(corpus), "--append-eod"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--workers", str(workers)]
    command += ["--tokenizer-model", str(tokenizer.parent), "--output-prefix", str(out / "all")]
    subprocess.run(command, check=True)


def why_missing(peer: str) -> str:
    """What a peer lacks on this machine; empty when it can run."""
    modules = {"datatrove": "datatrove", "megatron": "tools.preprocess_data"}
    if peer not in modules:
        return ""
    try:
        found = find_spec(modules[peer])
    except ModuleNotFoundError:
        found = None
    return "" if found else f"{modules[peer]} is not installed"


PEERS: dict[str, Callable[[Path, Path, Path, int], None]] = {
    "tokenizers": tokenizers_floor,
    "gigatoken": gigatoken_bare,
    "datasets": hf_datasets,
    "datatrove": datatrove,
    "megatron": megatron,
}


def _batches(lines: Iterator[bytes]) -> Iterator[list[str]]:
    texts: list[str] = []
    for line in lines:
        texts.append(json.loads(line)["text"])
        if len(texts) == LINES_AT_ONCE:
            yield texts
            texts = []
    if texts:
        yield texts


def run(peer: str, corpus: str, tokenizer: str, out: str, workers: str) -> None:
    """Run one peer, as the words of a command line say it."""
    PEERS[peer](Path(corpus), Path(tokenizer), Path(out), int(workers))
