"""`{config-keys} SECTION`: keys of a configuration, from the models that check it.

SECTION is a section of a run (`run`, `model`, ...), a mapping within one (`rope_scaling`,
`memory`, `weight_schedule`, `review`, `review_phase`), or `build` and `source` for the two levels
of a data configuration.
"""

import collections.abc
import dataclasses
import functools
import operator
import types
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx

from data_prep.building.data_config import _CONFIG, _SOURCE
from data_prep.building.options import BuildOptions, Source
from docs.extensions.docstrings import attribute_descriptions
from docs.extensions.markdown import MarkdownDirective, table
from model.memory.sizes import MemorySizes
from model.operations.rope_scaling import RopeScaling
from pipeline.config.data_section import WeightPhase
from pipeline.config.review_section import PUBLISHED_PHASES, ReviewPhase, ReviewSection
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import MAX_COUNT

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
}
# Of numbers whose name does not end with its unit; "" = a number without one.
_UNITS = {
    "data.sequence_length": "tokens",
    "data.prefetch_steps": "steps",
    "parallel.tensor": "ranks",
    "parallel.zero_hpz_partition_size": "ranks",
    "train.spike_sigmas": "standard deviations",
    "train.spike_window": "steps",
    "train.max_rollbacks": "rollbacks",
    "parallel.zero": "",
    "parallel.stages": "stages",
    "parallel.reduce_bucket_size": "elements",
    "batch.micro_size": "samples",
    "batch.accumulation": "micro-batches",
    "train.steps": "steps",
    "train.stop_at_step": "steps",
    "train.max_skipped_steps": "steps",
    "eval.samples": "samples",
    "checkpoint.keep": "checkpoints",
    "checkpoint.keep_best": "checkpoints",
    "checkpoint.keep_every": "steps",
    "log.interval": "steps",
    "model.layers": "layers",
    "model.hidden_size": "elements",
    "model.ffn_hidden_size": "elements",
    "model.attention_heads": "attention heads",
    "model.kv_heads": "attention heads",
    "model.vocab_size": "tokens",
    "model.future_tokens": "heads",
    "model.head_layers": "layers",
    "memory.segment": "tokens",
    "memory.summary": "tokens",
    "memory.sensory": "tokens",
    "memory.cache": "memories",
    "memory.width": "elements",
    "memory.bptt": "segments",
    "memory.adapter_rank": "columns",
    "memory.adapter_alpha": "columns",
    "rope_scaling.original_max_position_embeddings": "tokens",
    "weight_schedule.step": "steps",
    "review.sequences": "sequences",
    "review.min_targets": "tokens",
    "review.running_mean_sequences": "sequences",
    "review.rescore_percent": "percent",
    "review_phase.epochs": "epochs",
    "review_phase.drop_percent": "percent",
    "review_phase.repetitions": "repetitions",
    "build.workers": "processes",
}
_SUFFIXES = {"_s": "seconds", "_steps": "steps", "_tokens": "tokens", "_bytes": "bytes"}


class Key(NamedTuple):
    """One key as the page shows it."""

    name: str
    kind: str
    default: str
    unit: str
    description: str


def keys_of(section: str) -> list[Key]:
    """The keys of a section, in the order of its class."""
    if section in ("build", "source"):
        return list(_data_keys(section))
    owner = _run_classes()[section]
    described = attribute_descriptions(owner)
    return [
        Key(
            name,
            words(field.annotation, field.metadata),
            _default(field),
            unit(f"{section}.{name}", field.annotation),
            described.get(name, ""),
        )
        for name, field in owner.model_fields.items()
    ]


def sections() -> list[str]:
    """Everything that `keys_of` takes."""
    return [*_run_classes(), "build", "source"]


def _run_classes() -> dict[str, type[BaseModel]]:
    classes: dict[str, type[BaseModel]] = {}
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        classes[name] = field.annotation
    return {
        **classes,
        "rope_scaling": RopeScaling,
        "review": ReviewSection,
        "review_phase": ReviewPhase,
        "memory": MemorySizes,
        "weight_schedule": WeightPhase,
    }


def _data_keys(section: str) -> Iterator[Key]:
    """Keys of a data configuration; types and words are those of the options' dataclasses."""
    options, model = (BuildOptions, _CONFIG) if section == "build" else (Source, _SOURCE)
    described = attribute_descriptions(options)
    fields = {field.name: field for field in dataclasses.fields(options)}
    yaml_names = {"inputs": "input", "globs": "glob"}
    for name, field in fields.items():
        key = yaml_names.get(name, name)
        annotation = model.model_fields[key].annotation
        kind = "list of sources" if name == "sources" else words(_without_none(annotation), ())
        default = "required" if field.default is dataclasses.MISSING else shown(field.default)
        counted = unit(f"{section}.{key}", annotation)
        yield Key(key, kind, default, counted, described.get(name, ""))


def _without_none(annotation: Any) -> Any:
    """In a data configuration every key may be left out, which its model writes as None."""
    kept = [part for part in get_args(annotation) if part is not types.NoneType]
    return functools.reduce(operator.or_, kept) if _is_union(annotation) else annotation


def words(annotation: Any, metadata: Any) -> str:
    """A type with its bounds, as a person would say it.

    Example:
        `Annotated[int, Field(gt=0)] | None` is "whole number > 0, or null".
    """
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return words(inner, [*metadata, *more])
    if isinstance(annotation, types.GenericAlias) or get_origin(annotation) is not None:
        return _compound(annotation)
    bounds = _bounds(metadata)
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "path"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return _KINDS[annotation] + bounds


def _compound(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if _is_union(annotation):
        kinds = [words(part, ()) for part in parts if part is not types.NoneType]
        return " or ".join(kinds) + (", or null" if types.NoneType in parts else "")
    if origin in (dict, collections.abc.Mapping):
        return f"mapping of {words(parts[0], ())} to {words(parts[1], ())}"
    assert origin in (tuple, list), f"no words for {annotation}"
    if parts[-1] is ... or origin is list:
        return f"list of {_plural(words(parts[0], ()))}"
    return f"[{', '.join(words(part, ()) for part in parts)}]"


def _plural(kind: str) -> str:
    return f"{kind}s" if kind in ("path", "number", "mapping", "whole number") else kind


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _bounds(metadata: Any) -> str:
    signs = (
        (annotated_types.Gt, "gt", ">"),
        (annotated_types.Ge, "ge", "≥"),
        (annotated_types.Lt, "lt", "<"),
        (annotated_types.Le, "le", "≤"),
    )
    found = []
    for item in metadata:
        for part in item.metadata if isinstance(item, FieldInfo) else [item]:
            for kind, name, sign in signs:
                if isinstance(part, kind) and (limit := getattr(part, name)) != MAX_COUNT:
                    found.append(f" {sign} {_limit(limit)}")
    return ",".join(found)


def _limit(limit: int | float) -> str:
    """A bound, large powers of two as such."""
    power = int(limit).bit_length() - 1
    return f"2^{power}" if power >= 16 and limit == 1 << power else f"{limit}"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "derived"
    if field.default is PydanticUndefined:
        return "required"
    return shown(field.default)


def shown(value: object) -> str:
    """A default as YAML has it."""
    if value is None:
        return "`null`"
    if value == PUBLISHED_PHASES:
        return "`published`"
    if value == ():
        return "`[]`"
    text = TypeAdapter(object).dump_json(value).decode()
    return f"`{text.strip(chr(34))}`"


def unit(key: str, annotation: Any) -> str:
    """What a number counts; empty for what has no unit."""
    if key in _UNITS:
        return _UNITS[key]
    if not _has_numbers(annotation):
        return ""
    suffixes = (unit for suffix, unit in _SUFFIXES.items() if key.endswith(suffix))
    return next(suffixes, "")


def _has_numbers(annotation: Any) -> bool:
    if annotation in (int, float):
        return True
    return any(_has_numbers(part) for part in get_args(annotation))


class ConfigKeysDirective(MarkdownDirective):
    """The table of a section's keys."""

    def lines(self, argument: str) -> list[str]:
        """One row for each key."""
        rows = [
            [f"`{key.name}`", key.kind, key.default, key.unit, key.description]
            for key in keys_of(argument)
        ]
        return [*table(["key", "type", "default", "unit", "meaning"], rows), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("config-keys", ConfigKeysDirective)
    return {"parallel_read_safe": True}
