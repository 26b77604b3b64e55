"""Prompts and completions, and chats, to shards: which tokens are targets, and what is refused."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.building.options import Source
from data_prep.conversations.marks import plain_text
from data_prep.errors import BadRecordsError, DataError
from data_prep.export_megatron import export
from data_prep.inspect import find_document
from data_prep.report import make_page
from data_prep.shards.arrow_file import read_shard
from data_prep.shards.manifest import MANIFEST, Manifest, load_manifest
from data_prep.shards.shard_set import ShardSet
from data_prep.verify import find_problems

Build = Callable[..., Manifest]
END = 256
KEYS = {"prompt_key": "q", "completion_key": "a.text"}
TEMPLATE = """\
{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}\
{% if message.role == "assistant" %}{{ eos_token }}{% endif %}

{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CONTENT = "{{ message.content | trim }}"
MARKED = TEMPLATE.replace(
    CONTENT,
    '{% if message.role == "assistant" %}'
    f"{{% generation %}}{CONTENT}{{% endgeneration %}}{{% else %}}{CONTENT}{{% endif %}}",
)


def records(count: int) -> list[dict[str, object]]:
    """Questions and answers of many lengths."""
    return [
        {"q": f"{n} + {n} = ", "a": {"text": f"{'so ' * (n % 7)}{2 * n}"}} for n in range(count)
    ]


def write(path: Path, lines: Sequence[Mapping[str, object]]) -> Path:
    """A file of JSON lines."""
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def documents(output: Path, split: str = "train") -> list[tuple[list[int], list[bool]]]:
    """Ids and targets of every document of a split, from its Arrow files alone."""
    found = []
    for shard in load_manifest(output).shards:
        if shard.split != split:
            continue
        rows, _ = read_shard(output / shard.path)
        assert rows.targets is not None
        for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
            found.append((rows.tokens[start:end].tolist(), rows.targets[start:end].tolist()))
    return found


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_completions_and_ends_are_targets(tmp_path: Path, build_set: Build, kind: str) -> None:
    """The parts are encoded alone, in every format; the set passes `verify`."""
    path = tmp_path / f"qa.{kind}"
    lines = records(50)
    if kind == "jsonl":
        write(path, lines)
    elif kind == "json":
        path.write_text(json.dumps(lines))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    else:
        table = pa.Table.from_pylist(lines)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    build_set(path, validation_fraction=0, shard_tokens=100, **KEYS)
    expected = []
    for line in lines:
        prompt, completion = str(line["q"]).encode(), str(line["a"]["text"]).encode()  # type: ignore[index]
        ids = [*prompt, *completion, END]
        expected.append((ids, [False] * len(prompt) + [True] * (len(completion) + 1)))
    assert documents(tmp_path / "out") == expected
    assert list(find_problems(tmp_path / "out")) == []


def test_bits_are_read_from_any_place(tmp_path: Path, build_set: Build) -> None:
    """Over the borders of bytes and shards; one bit per token on disk."""
    build_set(
        write(tmp_path / "qa.jsonl", records(40)), validation_fraction=0, shard_tokens=64, **KEYS
    )
    whole = [target for _, targets in documents(tmp_path / "out") for target in targets]
    shards = ShardSet.open(tmp_path / "out", "train")
    assert len(shards.shards) > 5
    assert shards.num_targets == sum(whole)
    for start in range(0, len(whole) - 90, 3):
        for count in (1, 7, 90):
            out = np.empty(count, np.bool_)
            shards.read_targets(start, out)
            assert out.tolist() == whole[start : start + count]


def test_bad_records_are_rejects(tmp_path: Path, build_set: Build) -> None:
    """Each with its reason; nothing else is lost."""
    bad: list[Mapping[str, object]] = [
        {"q": "x"},
        {"a": {"text": "x"}},
        {"q": 3, "a": {"text": "x"}},
        {"q": "x", "a": {"text": ""}},
        {"q": "x", "a": {"text": None}},
    ]
    path = write(tmp_path / "qa.jsonl", [*bad, *records(20)])
    manifest = build_set(path, max_bad_fraction=1, **KEYS)
    assert manifest.totals.documents == 20
    assert manifest.totals.rejects_by_reason == {
        "'a.text' is empty": 1,
        "'a.text' is not a string": 1,
        "'q' is not a string": 1,
        "no 'a.text'": 1,
        "no 'q'": 1,
    }
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    with pytest.raises(BadRecordsError, match="none of 100 records has text at --messages-key m"):
        build_set(
            write(tmp_path / "many.jsonl", records(100)),
            output="other", messages_key="m", chat_template=template,
        )  # fmt: skip


def test_the_split_between_prompt_and_completion_is_in_the_fingerprint(
    tmp_path: Path, build_set: Build
) -> None:
    """The same tokens with other targets are another set; duplicates have the same split."""
    one = [{"q": "ab", "a": {"text": "c"}}]
    other = [{"q": "a", "a": {"text": "bc"}}]
    first = build_set(write(tmp_path / "1.jsonl", one), output="1", **KEYS)
    second = build_set(write(tmp_path / "2.jsonl", other), output="2", **KEYS)
    assert first.shards[0].tokens_xxh3_128 == second.shards[0].tokens_xxh3_128
    assert first.fingerprint != second.fingerprint
    path = write(tmp_path / "3.jsonl", [*one, *other, *one])
    both = build_set(path, output="3", dedup="exact", **KEYS)
    assert (both.totals.documents, both.totals.duplicates) == (2, 1)


def test_workers_and_restarts_change_nothing(
    tmp_path: Path, build_set: Build, read_tree: Callable[[Path], dict[str, bytes]]
) -> None:
    """One worker or two, or a shard that was lost and made again: the same bytes."""
    path = write(tmp_path / "qa.jsonl", records(300))
    build_set(path, output="one", unit_bytes=2000, **KEYS)
    build_set(path, output="two", unit_bytes=2000, workers=2, **KEYS)
    expected = read_tree(tmp_path / "one")
    assert read_tree(tmp_path / "two") == expected
    next((tmp_path / "two").rglob("*.arrow")).unlink()
    build_set(path, output="two", unit_bytes=2000, **KEYS)
    assert read_tree(tmp_path / "two") == expected
    with pytest.raises(DataError, match=r"prompt_key: 'q' then, 'a\.text' now"):
        build_set(path, output="two", prompt_key="a.text", completion_key="q")


def test_sets_of_texts_do_not_name_targets(
    tmp_path: Path, write_jsonl: Callable[..., Path], build_set: Build
) -> None:
    """Neither manifest nor journal nor shards: their bytes are those of earlier versions."""
    build_set(write_jsonl(["a", "b"]))
    for path in (tmp_path / "out").rglob("*.json"):
        assert b'"targets"' not in path.read_bytes(), path
        assert b'"form"' not in path.read_bytes(), path
    shard = next((tmp_path / "out").rglob("*.arrow"))
    assert b"targets" not in shard.read_bytes()


def test_tools_know_targets(tmp_path: Path, build_set: Build) -> None:
    """`inspect` shows the parts, the report counts, Megatron's format is refused."""
    build_set(write(tmp_path / "qa.jsonl", records(30)), validation_fraction=0, **KEYS)
    shards = ShardSet.open(tmp_path / "out", "train")
    parts = find_document(shards, 0).parts
    assert parts is not None
    assert [(part.is_target, part.text) for part in parts] == [(False, "0 + 0 = "), (True, "0")]
    assert "Targets: completions, and texts" in make_page(tmp_path / "out")
    with pytest.raises(DataError, match="says which tokens are targets"):
        export(shards, str(tmp_path / "m"))


def test_a_forged_bit_is_found(tmp_path: Path, build_set: Build) -> None:
    """A manifest with another count does not fit its shards."""
    build_set(write(tmp_path / "qa.jsonl", records(30)), **KEYS)
    path = tmp_path / "out" / MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["shards"][0]["targets"]["count"] += 1
    path.write_text(json.dumps(manifest))
    assert any(
        "tokens are targets, the manifest" in line for line in find_problems(tmp_path / "out")
    )


def chat(*turns: str) -> dict[str, object]:
    """A record of messages; the first letter of each is its role."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"m": [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]}


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["by prefix", "generation blocks"])
def test_only_the_assistant_is_learned_from(
    tmp_path: Path, build_set: Build, template: str
) -> None:
    """Ends of its turns are tokens, once; what a message spells is text."""
    file = tmp_path / "t.jinja"
    file.write_text(template)
    lines = [chat("sbe kind", "uhi <|endoftext|>", "ahello", "ubye", "asee you")]
    build_set(
        write(tmp_path / "c.jsonl", lines),
        messages_key="m", chat_template=file, validation_fraction=0,
    )  # fmt: skip
    ((ids, targets),) = documents(tmp_path / "out")
    assert ids.count(END) == 2
    text = "".join(chr(token) if token < END else "#" for token in ids)
    assert text == (
        "<|system|>be kind\n<|user|>hi <|endoftext|>\n<|assistant|>hello#\n<|user|>bye\n"
        "<|assistant|>see you#"
    )
    learned = "".join(sign for sign, target in zip(text, targets, strict=True) if target)
    by_prefix = "hello#\nsee you#"
    assert learned == (by_prefix if template is TEMPLATE else "hellosee you#")
    assert list(find_problems(tmp_path / "out")) == []


def test_chats_that_cannot_be_used_are_rejects(tmp_path: Path, build_set: Build) -> None:
    """Unknown roles, nothing of an assistant, no list, content of another kind."""
    file = tmp_path / "t.jinja"
    file.write_text(
        TEMPLATE + "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    )
    lines: list[Mapping[str, object]] = [
        {"m": [{"role": "pirate", "content": "arr"}]},
        {"m": "text"},
        {"m": []},
        {"m": [{"role": "user", "content": [1]}]},
        {"m": [{"role": "assistant"}]},
        chat("uhi"),
        chat("ux", "ay"),
        chat("uspells <|endoftext|>", "ay"),
        chat("ugood", "ay"),
    ]
    manifest = build_set(
        write(tmp_path / "c.jsonl", lines),
        messages_key="m", chat_template=file, max_bad_fraction=1, special_tokens="reject",
    )  # fmt: skip
    assert manifest.totals.documents == 1
    assert manifest.totals.rejects_by_reason == {
        "'m' is empty": 1,
        "'m' is not a list of messages": 1,
        "a message without content": 1,
        "no text of an assistant": 1,
        "spells '<|endoftext|>'": 1,
        "the chat template refuses it: no x": 1,
        "the content of a message is not a string": 1,
        "unknown role": 1,
    }


def test_templates_are_sandboxed_and_checked(tmp_path: Path, build_set: Build) -> None:
    """No template, one that is none, and one that reaches for Python."""
    path = write(tmp_path / "c.jsonl", [chat("uhi", "ay")] * 3)
    with pytest.raises(DataError, match="has no chat template, which --messages-key needs"):
        build_set(path, messages_key="m")
    file = tmp_path / "t.jinja"
    file.write_text("{% for %}")
    with pytest.raises(DataError, match="give a Jinja template"):
        build_set(path, messages_key="m", chat_template=file)
    file.write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(DataError, match="refuses it"):
        build_set(path, messages_key="m", chat_template=file)


def test_the_template_of_a_tokenizer_folder_is_taken(tmp_path: Path, build_set: Build) -> None:
    """With its own end of a turn, which the config of the folder names."""
    folder = tmp_path / "tokenizer"
    build_set(write(tmp_path / "t.jsonl", [{"text": "a"}]), output="plain")
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tmp_path / "plain" / "tokenizer.json").read_bytes())
    config = {"chat_template": TEMPLATE, "eos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = write(tmp_path / "c.jsonl", [chat("uhi", "ay")])
    build_set(path, messages_key="m", tokenizer=str(folder), validation_fraction=0)
    ((ids, targets),) = documents(tmp_path / "out")
    assert (ids[-2:], targets[-3:]) == ([ord("y"), END], [False, True, True])


def test_options_that_contradict_each_other(tmp_path: Path, build_set: Build) -> None:
    """All in one message."""
    path = write(tmp_path / "c.jsonl", [{}])
    with pytest.raises(DataError) as caught:
        build_set(path, prompt_key="q", messages_key="m")
    assert "--prompt-key is given without --completion-key" in str(caught.value)
    assert "--messages-key and --prompt-key are both given" in str(caught.value)
    with pytest.raises(DataError, match="--chat-template has no effect"):
        build_set(path, chat_template=path)


def test_a_source_of_texts_beside_one_of_prompts(tmp_path: Path, build_set: Build) -> None:
    """A source that names any key is read by its own; all tokens of texts are targets."""
    text = write(tmp_path / "t.jsonl", [{"text": f"text {n}"} for n in range(9)])
    sources = (
        Source("plain", (text,), text_key="text"),
        Source("qa", (write(tmp_path / "qa.jsonl", records(9)),)),
    )
    build_set(sources=sources, validation_fraction=0, **KEYS)
    shards = ShardSet.open(tmp_path / "out", "train")
    plain, marked = shards.of_source("plain"), shards.of_source("qa")
    assert (plain.has_targets, marked.has_targets) == (False, True)
    assert plain.num_targets == plain.num_tokens
    assert list(find_problems(tmp_path / "out")) == []


def test_marks_leave_the_text() -> None:
    """What tokens decode to is the document without them."""
    assert (
        plain_text("é\udcffx\udcfe<e>\udcfe".encode("utf-8", "surrogateescape")) == "éx<e>".encode()
    )
