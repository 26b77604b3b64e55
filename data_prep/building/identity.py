"""What identifies a job: the inputs and options that determine the bytes of its shards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.building.journal import JOURNAL, forget_job, has_shards
from data_prep.building.options import BuildOptions
from data_prep.building.plan import Plan
from data_prep.conversations.forms import RecordForm
from data_prep.errors import DataError
from data_prep.shards.atomic import write_whole
from data_prep.shards.manifest import FORMAT_VERSION

DESCRIPTION = "job.json"
NAMED_INPUTS = 3


def describe_job(
    options: BuildOptions,
    plan: Plan,
    forms: Sequence[RecordForm | None],
    tokenizer: Mapping[str, str | None],
) -> dict[str, Any]:
    """Everything that determines the bytes of the shards, as it is kept in journal/job.json.

    The weights of sources are not in it: they decide how shards are read, not what they hold.
    """
    inputs: list[dict[str, list[Any]]] = [{} for _ in plan.sources]
    for number, file in zip(plan.file_sources, plan.files, strict=True):
        inputs[number][file.path] = list(file)[1:]
    return {
        "version": FORMAT_VERSION,
        "tokenizer": dict(tokenizer),
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_tokens,
        "unit_bytes": plan.unit_bytes,
        "special_tokens": options.special_tokens,
        "max_document_bytes": options.max_document_bytes,
        "dedup": options.dedup,
        "sources": {
            source.name: {"text_key": source.text_key, **_form_facts(form), "inputs": files}
            for source, form, files in zip(plan.sources, forms, inputs, strict=True)
        },
    }


def _form_facts(form: RecordForm | None) -> dict[str, Any]:
    """What identifies a form; nothing for texts, whose jobs have no such key."""
    return {"form": form.model_dump(exclude_defaults=True)} if form else {}


def hash_description(description: Mapping[str, Any]) -> str:
    """sha256 of a description; input order counts."""
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def claim_output(output: Path, description: Mapping[str, Any], *, may_clear: bool = False) -> None:
    """Make `output` the folder of this job, or find that it already is.

    A folder that another job claimed and then put no shard into, because it failed, is free.

    Args:
        output: The folder.
        description: Of this job.
        may_clear: The caller holds the folder: what such a job left in it is removed.

    Raises:
        DataError: The folder holds something else, or shards from other inputs or options; the
            message says what differs.
    """
    path = output / JOURNAL / DESCRIPTION
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output} is a file; name a directory")
    if not path.exists():
        if output.is_dir() and any(entry.name != JOURNAL for entry in output.iterdir()):
            raise DataError(
                f"--output {output} is not empty and holds no shards of this program; name a new "
                "directory"
            )
        write_whole(path, json.dumps(description, indent=1).encode())
        return
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a new --output") from error
    if hash_description(earlier) == hash_description(description):
        return
    if has_shards(output):
        raise DataError(
            f"--output {output} holds shards from other inputs or options "
            f"({'; '.join(_differences(earlier, description))}); name a new --output, or delete "
            "this one to make it again"
        )
    if may_clear:
        forget_job(output)
        write_whole(path, json.dumps(description, indent=1).encode())


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in a few words each."""
    found = [
        f"{key}: {earlier.get(key)!r} then, {now[key]!r} now"
        for key in now
        if key not in ("sources", "tokenizer") and earlier.get(key) != now[key]
    ]
    before, after = earlier.get("tokenizer", {}), now["tokenizer"]
    found += [
        f"tokenizer {key}: {before.get(key)} then, {after[key]} now"
        for key in after
        if before.get(key) != after[key]
    ]
    then_sources, now_sources = earlier.get("sources", {}), now["sources"]
    found += [f"new source: {name}" for name in now_sources if name not in then_sources]
    found += [f"gone source: {name}" for name in then_sources if name not in now_sources]
    for name in now_sources:
        if name in then_sources:
            prefix = f"source {name}: " if len(now_sources) > 1 else ""
            found += [
                prefix + line for line in _source_changes(then_sources[name], now_sources[name])
            ]
    return found or ["the order of the sources or inputs"]


def _form_change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys of prompts, completions and chats that differ, without the text of templates."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    shown_ones = [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in names
        if name.endswith("_key")
    ]
    return "; ".join(shown_ones) or f"another chat {' and '.join(names)}"


def _source_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two states of one source."""
    found = []
    if then["text_key"] != now["text_key"]:
        found.append(f"text_key: {then['text_key']!r} then, {now['text_key']!r} now")
    if then.get("form") != now.get("form"):
        found.append(_form_change(then.get("form") or {}, now.get("form") or {}))
    then_inputs, now_inputs = then["inputs"], now["inputs"]
    changes = {
        "new": [path for path in now_inputs if path not in then_inputs],
        "gone": [path for path in then_inputs if path not in now_inputs],
        "changed": [
            path
            for path, state in now_inputs.items()
            if path in then_inputs and list(then_inputs[path]) != list(state)
        ],
    }
    for kind, paths in changes.items():
        if paths:
            named = ", ".join(paths[:NAMED_INPUTS])
            more = f" and {len(paths) - NAMED_INPUTS} more" if len(paths) > NAMED_INPUTS else ""
            found.append(f"{kind} inputs: {named}{more}")
    return found
