"""What is kept of an imported model's folder: small regular files and plausible values."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError
from model.hugging_face.identity import ImportedIdentity, load_identity, read_identity

CONFIG = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 300}


def _folder(path: Path, config: dict[str, Any], **files: str | bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (path / name.replace("_json", ".json").replace("_jinja", ".jinja")).write_bytes(data)
    return path


def _read(folder: Path) -> ImportedIdentity:
    return read_identity(folder, vocab_size=300, tokenizer="same")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {}),
        ({"bos_token_id": None}, {"bos_token_id": None}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": [5, 6]}),
        ({"pad_token_id": -1}, {"pad_token_id": -1}),
        ({"use_cache": False, "pretraining_tp": 1}, {"use_cache": False}),
        ({"initializer_range": 0.1}, {"initializer_range": 0.1}),
    ],
)
def test_values_of_config_json_are_kept(
    given: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    """None are added: where a file says nothing, that is kept."""
    identity = _read(_folder(tmp_path / "model", given))
    assert kept.items() <= identity.config.items()
    assert identity.config.keys() == given.keys()
    assert identity.left_out == {}
    assert identity.positions == 4096


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bos_token_id", 300),
        ("bos_token_id", [1]),
        ("bos_token_id", True),
        ("eos_token_id", []),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", {"a": 1}),
        ("pad_token_id", -2),
        ("use_cache", "yes"),
        ("max_position_embeddings", "many"),
        ("max_position_embeddings", 0),
    ],
)
def test_values_that_cannot_be_meant_are_left_out(key: str, value: object, tmp_path: Path) -> None:
    """They are named, and do not keep the model from being imported."""
    identity = _read(_folder(tmp_path / "model", {key: value}))
    assert list(identity.left_out) == [key]
    assert identity.config.get(key) is None


def test_only_small_regular_files_are_kept(tmp_path: Path) -> None:
    """Pipes, folders, giants and what is not of its form are named, not read; links are read."""
    folder = _folder(
        tmp_path / "model",
        {},
        generation_config_json="[1]",
        special_tokens_map_json="{" * 100_000,
        chat_template_jinja=b"\xff",
        vocab_json='{"a": 0, "b": ' + "1" * 40 + "}",
    )
    os.mkfifo(folder / "tokenizer_config.json")
    (folder / "added_tokens.json").mkdir()
    with (folder / "tokenizer.model").open("wb") as file:
        file.truncate(9 << 20)
    (tmp_path / "blob").write_text("#version: 0.2\n")
    (folder / "merges.txt").symlink_to(tmp_path / "blob")
    identity = _read(folder)
    assert identity.files.keys() == {"merges.txt", "vocab.json"}
    assert identity.left_out.keys() == {
        *("generation_config.json", "special_tokens_map.json", "chat_template.jinja"),
        *("tokenizer_config.json", "added_tokens.json", "tokenizer.model"),
    }
    assert identity.left_out["tokenizer_config.json"] == "it is not a regular file"
    assert identity.left_out["generation_config.json"] == "it is not a mapping"
    assert "larger than" in identity.left_out["tokenizer.model"]


def test_binary_files_go_through_json(tmp_path: Path) -> None:
    """A checkpoint has the bytes as they were, and their checksum."""
    content = bytes(range(256))
    folder = _folder(tmp_path / "model", {})
    (folder / "tokenizer.model").write_bytes(content)
    path = tmp_path / "imported.json"
    path.write_text(_read(folder).model_dump_json())
    kept = load_identity(path)
    assert kept == _read(folder)
    assert kept is not None
    assert kept.files["tokenizer.model"].content == content
    assert load_identity(tmp_path / "none.json") is None


def _changed(content: dict[str, Any], case: str) -> object:
    if case == "version":
        return content | {"version": 2}
    if case == "name":
        return content | {"files": {"../evil": content["files"]["merges.txt"]}}
    if case == "content":
        file = content["files"]["merges.txt"] | {"content": "AAAA"}
        return content | {"files": {"merges.txt": file}}
    if case == "keys":
        return content | {"config": {"model_type": "mistral"}}
    return [content]


@pytest.mark.parametrize("case", ["version", "name", "content", "keys", "list"])
def test_a_record_of_another_kind_is_refused(case: str, tmp_path: Path) -> None:
    """Another version, names that lead elsewhere, other bytes: one line, and no export."""
    folder = _folder(tmp_path / "model", {})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    path = tmp_path / "imported.json"
    content = json.loads(_read(folder).model_dump_json())
    path.write_text(json.dumps(_changed(content, case)))
    with pytest.raises(CheckpointError, match=r"imported\.json cannot be understood") as caught:
        load_identity(path)
    assert "\n" not in str(caught.value)
