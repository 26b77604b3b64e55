"""A model's sizes as the `config.json` of a Hugging Face Llama, and back."""

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from foundation.json_text import read_json
from foundation.shown_text import printable, reason
from model.config import ModelConfig
from model.errors import ConfigError
from model.operations.rope_scaling import RopeScaling
from model.structure.head_kinds import HeadKind, LMHeadKind, next_token_heads

CONFIG_NAME = "config.json"
# Ids of special tokens, and what transformers takes where config.json says nothing. An import that
# says nothing is kept so: once said, such an id would become a default of generate().
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}

DEFAULT_POSITIONS = 2048  # what transformers takes where config.json says nothing
_POSITIONS = range(1, 1 << 31)

# A model with linear heads or with a memory: no loader shall take it for a Llama.
LINEAR_MODEL_TYPE = "headway"

_KEYS = {
    "hidden_size": "hidden_size",
    "attention_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
# What transformers takes where config.json says nothing.
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
_DEFAULT_THETA = 10000.0
# What says how heads are made, with the values there are; the first where a file says nothing.
HEAD_KEYS: dict[str, tuple[Any, ...]] = {
    "head_kind": get_args(HeadKind),
    "head_layers": (1,),
    "lm_head": get_args(LMHeadKind),
}
# What the layers here compute; a file with other values is of another model.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", LINEAR_MODEL_TYPE),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
}


class LlamaSizes(NamedTuple):
    """What a `config.json` says about a Llama.

    Attributes:
        layers: all of them; the last ones are what the next token passes of heads.
        vocab_size: rows of the embedding.
        tied: whether the embedding also is the unembedding.
        positions: it was trained on; None = its file has something else there.
        keys: the keys of `ModelConfig` whose values it fixes.
        heads: those that say what its heads are, where it has some beside the next token's.
    """

    layers: int
    vocab_size: int
    tied: bool
    positions: int | None
    keys: dict[str, Any]
    heads: dict[str, Any]

    def model(self, num_heads: int) -> dict[str, Any]:
        """Fields of a `ModelConfig`: of all heads, or of the next-token model as one of one head.

        Args:
            num_heads: of the file, or 1.
        """
        layers = self.layers
        if num_heads > 1 and self.heads["head_kind"] != "linear":
            others = num_heads - len(next_token_heads(self.heads["head_kind"], num_heads))
            layers += others * self.heads["head_layers"]
        return {
            "layers": layers,
            "future_tokens": num_heads,
            "vocab_size": self.vocab_size,
            **self.keys,
            **self.heads,
        }


def llama_config(config: ModelConfig, *, sequence_length: int, dtype: str) -> dict[str, Any]:
    """`config.json` of the next-token model, without what concerns tokens and classes.

    Args:
        config: the model.
        sequence_length: positions it was trained on, before or after it was imported.
        dtype: of the weights, under torch's name.
    """
    scaling = config.rope_scaling
    positions = sequence_length
    if scaling is not None and scaling.original_max_position_embeddings is not None:
        stretched = int(scaling.original_max_position_embeddings * scaling.factor)
        positions = max(positions, stretched)
    parameters = {"rope_type": "default"} if scaling is None else scaling.parameters()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.next_token_layers,
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "initializer_range": config.init_std,
        "rope_theta": config.rope_theta,
        # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters
        **({} if scaling is None else {"rope_scaling": scaling.parameters()}),
        "rope_parameters": {**parameters, "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        # transformers 4 reads torch_dtype, transformers 5 dtype
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def read_llama_config(directory: Path) -> LlamaSizes:
    """The sizes of the Llama in a folder.

    Raises:
        ConfigError: there is no readable `config.json`, or it is of a model that is not a plain
            Llama; all reasons in one line.
    """
    path = directory / CONFIG_NAME
    return llama_sizes(path, _read(path))


def llama_sizes(path: Path, content: dict[str, Any]) -> LlamaSizes:
    """The same of a `config.json` that was read already.

    Args:
        path: what errors call it.
        content: of it.

    Raises:
        ConfigError: it is of a model that is not a plain Llama; all reasons in one line.
    """
    if problems := _unsupported(content):
        raise ConfigError(
            f"{path} is not of a Llama that can be imported: {'; '.join(problems)}; give a model "
            "of Hugging Face's plain Llama architecture"
        )
    values = _DEFAULTS | {key: value for key, value in content.items() if value is not None}
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    needed = ("num_hidden_layers", "vocab_size", *_KEYS.values())
    if missing := [key for key in needed if not _is_number(key, values.get(key))]:
        raise ConfigError(f"{path} has no number for {', '.join(missing)}; give a whole model")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim", hidden // heads)
    if not isinstance(head_dim, int) or head_dim * heads != hidden:
        raise ConfigError(
            f"{path} has head_dim={printable(str(head_dim))}, which is not hidden_size / "
            f"num_attention_heads = {hidden} / {heads}; such attention heads are not built here, "
            "give a model without them"
        )
    theta, scaling = _rope(path, values)
    keys = {ours: values[theirs] for ours, theirs in _KEYS.items()}
    return LlamaSizes(
        layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        tied=bool(values.get("tie_word_embeddings", False)),
        positions=positions_of(content),
        keys=keys | {"rope_theta": theta, "rope_scaling": scaling},
        heads=_heads(path, content),
    )


def positions_of(content: dict[str, Any]) -> int | None:
    """Positions that the model of a `config.json` was trained on; None = no number of them."""
    positions = content.get("max_position_embeddings", DEFAULT_POSITIONS)
    return positions if type(positions) is int and positions in _POSITIONS else None


def _heads(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What a Headway model's file says of its heads' kind; empty of any other."""
    if "future_tokens" not in content and content.get("model_type") != LINEAR_MODEL_TYPE:
        return {}
    found = {}
    for key, values in HEAD_KEYS.items():
        found[key] = content.get(key, values[0])
        is_number = type(found[key]) is int and found[key] >= 1
        if not (is_number if key == "head_layers" else found[key] in values):
            raise ConfigError(
                f"{path} has {key}={printable(json.dumps(found[key]))}, which no version here "
                "writes; give a whole model"
            )
    return found


def first_token(directory: Path, vocab_size: int) -> int | None:
    """The token that a text of the model in a folder begins with; None when it has none.

    A file that says nothing means what transformers takes then.

    Raises:
        ConfigError: there is no readable `config.json`.
    """
    value = _read(directory / CONFIG_NAME).get("bos_token_id", TOKEN_IDS["bos_token_id"])
    return value if type(value) is int and 0 <= value < vocab_size else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give a folder with a Hugging Face Llama: {CONFIG_NAME} and "
            "its safetensors files"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({reason(error)}); give a whole model") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping; give a whole model")
    return content


def _unsupported(content: dict[str, Any]) -> list[str]:
    problems = []
    for key, allowed in _REQUIRED.items():
        value = content.get(key, _DEFAULTS.get(key))
        if value not in allowed:
            shown = "set" if isinstance(value, dict) else printable(json.dumps(value))
            problems.append(f"{key} is {shown}, must be {json.dumps(allowed[0])}")
    return problems


def _is_number(key: str, value: object) -> bool:
    kinds = (float, int) if key == "rms_norm_eps" else (int,)
    return type(value) in kinds and value > 0  # type: ignore[operator]


def _rope(path: Path, values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from the keys of transformers 4 or 5."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    parameters = dict(given) if isinstance(given, dict) else {"rope_type": given}
    theta = parameters.pop("rope_theta", values.get("rope_theta", _DEFAULT_THETA))
    if type(theta) not in (int, float) or theta <= 0:
        raise ConfigError(f"{path} has no number for rope_theta; give a whole model")
    older = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", older)
    if parameters.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ConfigError(
            f"{path} rotates only a part of each attention head (partial_rotary_factor), which is "
            "not built here; give a model that rotates all of it"
        )
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise ConfigError(
            f"{path} scales rotary frequencies by rope_type={printable(repr(kind))}; default, "
            "linear and llama3 can be imported, give a model with one of these"
        )
    if kind == "llama3":
        parameters.setdefault(
            "original_max_position_embeddings", values.get("max_position_embeddings")
        )
    else:
        parameters.pop("original_max_position_embeddings", None)  # of no effect on a linear one
    try:
        return float(theta), RopeScaling.model_validate({"rope_type": kind, **parameters})
    except ValidationError as error:
        fault = error.errors()[0]
        where = printable(".".join(["rope_scaling", *map(str, fault["loc"])]))
        problem = printable(fault["msg"].removeprefix("Value error, "))
        raise ConfigError(f"{path}: {where}: {problem}; give a whole model") from error
