"""Initial weights from a Hugging Face Llama, or from a Headway export with its extra heads.

    file                                run
    embed_tokens, norm, lm_head         embedding, final norm, unembedding
    layers 0 .. N-2                     trunk layers 0 .. N-2
    layer N-1, the last one             head 1
    extra_heads.k                       head k, as many as the folder has: an export, or what
                                        transformers saved of one
                                        further heads: copies of layer N-1, or fresh ones

So a Llama of N layers starts a run of N - 1 + n layers. With heads of m layers the last m are
head 1. Anticausal heads n .. 1 are the last layers, and nothing is new. Linear heads come on top of
all N layers: what a folder lacks of them begins as the identity, which says the next token.

Tensors are read one at a time, each rank keeps its tensor-parallel slice. Of a vocabulary larger
than the file's the last rows are fresh.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from foundation.shown_text import printable, reason
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hugging_face.config import read_llama_config
from model.hugging_face.folder import RECORD_NAME, read_record, verify_files
from model.hugging_face.names import (
    EXTRA_HEADS,
    EXTRA_LM_HEADS,
    LINEAR_HEAD_1,
    hf_names,
    hf_shapes,
    is_extra,
    join,
    layers_from_llama,
)
from model.hugging_face.stored_tensors import (
    MODEL_INDEX_NAME,
    MODEL_NAME,
    open_tensors,
    read_weight_map,
)
from model.memory.adapters import is_adapter
from model.memory.sizes import MEMORY
from model.operations.rope_scaling import RopeScaling
from model.structure.parameter_shapes import (
    LINEAR,
    head_of,
    own_unembedding,
    parameter_shapes,
)
from model.structure.sharding import placement_of, take_slice

NewHeads = Literal["copy", "fresh"]

_EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
_UNUSED = re.compile(r".*rotary_emb\.inv_freq")  # buffers that older files carry along
_OF_A_HEAD = re.compile(rf"(?:{EXTRA_HEADS}|{EXTRA_LM_HEADS})\.(\d{{1,9}})\.")
_FLOATS = ("F64", "F32", "F16", "BF16")


class LlamaFolder:
    """A folder with a Llama, inspected but not read: sizes, and which file has each tensor.

    Args:
        directory: the folder.

    Attributes:
        directory: the folder.
        sizes: what its config.json says.
        heads: how many heads it holds; 1 unless it is a Headway export, or was one.

    Raises:
        ConfigError: it is not a Llama that can be imported.
        CheckpointError: a file is missing or unreadable.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sizes = read_llama_config(directory)
        if self.sizes.layers < 2:
            raise ConfigError(
                f"{directory} has 1 layer, which becomes head 1 and leaves no trunk; give a model "
                "of at least 2 layers"
            )
        files = _model_files(directory)
        heads = None
        if (directory / RECORD_NAME).is_file():
            record = read_record(directory)
            heads = record.future_tokens
            files += [directory / name for name in record.files if name.startswith(EXTRA_HEADS)]
        self._files = {name: path for path in files for name in _tensor_names(path)}
        self.heads = heads or _last_head(self._files)
        self._linear = LINEAR_HEAD_1 in self._files
        # No matter how many of its last layers were heads, it is a plain Llama to read.
        self._plain = not self._linear and not any(map(is_extra, self._files))

    def holds(self, name: str, config: ModelConfig) -> bool:
        """Whether it has the weights of a parameter of the run's model."""
        if _is_added(name):
            return name in self._files
        head = head_of(name)
        if config.head_kind == "linear" and not self._linear:
            return head == 0  # of a plain Llama
        passed = head in config.next_token_heads and name != own_unembedding(head)
        return passed or head <= (1 if self._plain else self.heads)

    def next_token_config(self) -> ModelConfig:
        """Sizes of its next-token model alone, as a model of one head.

        Raises:
            ConfigError: its config.json has sizes that no model has.
        """
        try:
            return ModelConfig.model_validate(self.sizes.model(1))
        except ValidationError as error:
            fault = error.errors()[0]
            where = printable(".".join(map(str, fault["loc"])))
            raise ConfigError(
                f"{self.directory} has a config.json of no model ({where}: "
                f"{printable(fault['msg'])}); give a whole model"
            ) from error

    def new_heads(self, config: ModelConfig) -> list[int]:
        """Heads of the run's model that have weights which the folder lacks."""
        lacking = {
            head_of(name)
            for name in parameter_shapes(config)
            if not _is_added(name) and not self.holds(name, config)
        }
        return sorted(lacking)

    def verify(self) -> None:
        """Read every file of a Headway export and compare it with its checksum.

        Other folders have no checksums to compare with.

        Raises:
            CheckpointError: naming the first file that differs.
        """
        if (self.directory / RECORD_NAME).is_file():
            verify_files(self.directory, read_record(self.directory))

    def differences(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of the model's configuration that do not fit, with the value each must have."""
        wanted = {"layers": layers_from_llama(self.sizes.layers, config), **self.sizes.keys}
        if not self._plain:
            wanted |= self.sizes.heads
        wanted = {key: value for key, value in wanted.items() if getattr(config, key) != value}
        if config.vocab_size < self.sizes.vocab_size:
            wanted["vocab_size"] = self.sizes.vocab_size
        return wanted

    def check(self, config: ModelConfig) -> None:
        """Check that a model of these sizes can take the folder's weights.

        Raises:
            ConfigError: naming every key that differs, with the value to set.
            CheckpointError: a tensor is missing, has another shape, or is not a Llama's.
        """
        if wanted := self.differences(config):
            layers = layers_from_llama(self.sizes.layers, config)
            rule = f"trunk and {config.future_tokens} heads make {layers}"
            raise self._differs(config, wanted, f"so {rule}")
        self._check_tensors(config)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in."""
        if name == _UNEMBEDDING and self.sizes.tied:
            name = _EMBEDDING
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def _differs(self, config: ModelConfig, wanted: dict[str, Any], rule: str) -> ConfigError:
        """The error of keys that do not fit, with the values that `differences` gave."""
        listed = "; ".join(
            f"model.{key}={_shown(getattr(config, key))} must be {_shown(value)}"
            for key, value in wanted.items()
        )
        settings = " ".join(_setting(key, value) for key, value in wanted.items())
        return ConfigError(
            f"{self.directory} has {self.sizes.layers} layers, {rule}; its sizes are not this "
            f"run's: {listed}; set them in the YAML or with --set {settings}"
        )

    def _check_tensors(self, config: ModelConfig) -> None:
        unused = {name for name in self._files if _UNUSED.fullmatch(name)}
        if self.sizes.tied:
            unused.add(_UNEMBEDDING)
        wanted = dict(self._expected_shapes(config))
        foreign = sorted(set(self._files) - wanted.keys() - unused)
        # Heads that the run leaves out are not foreign.
        foreign = [name for name in foreign if not is_extra(name)]
        if foreign:
            raise CheckpointError(
                f"{self.directory}: tensor {printable(foreign[0])}"
                + (f" and {len(foreign) - 1} more are" if len(foreign) > 1 else " is")
                + " not a plain Llama's, so the model would not be the same; give a model "
                "without them"
                + (
                    ", or set model.memory as its config.json has it"
                    * foreign[0].startswith(MEMORY)
                )
            )
        for name, shape in wanted.items():
            if name not in self._files:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} is missing; give a whole model"
                )
            with _opened(self._files[name]) as file:
                found = file.get_slice(name)
                kind, found_shape = found.get_dtype(), tuple(found.get_shape())
            if found_shape != shape and name.startswith(MEMORY):
                raise ConfigError(
                    f"{self.directory}: tensor {name} has shape {found_shape}, and this run's "
                    f"model.memory asks for {shape}; set model.memory.width={found_shape[0]}"
                )
            if found_shape != shape:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} has shape {found_shape}, its config.json "
                    f"gives {shape}; give a whole model"
                )
            if kind not in _FLOATS:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} is stored as {kind}; give a model in "
                    "bfloat16, float16 or float32"
                )

    def _expected_shapes(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that are taken from the folder."""
        stored = config.model_copy(update={"vocab_size": self.sizes.vocab_size})
        for name, shape in parameter_shapes(stored).items():
            if not self.holds(name, config):
                continue
            names = hf_names(name, config)
            for hf_name, hf_shape in zip(names, hf_shapes(name, shape, config), strict=True):
                if not (hf_name == _UNEMBEDDING and self.sizes.tied):
                    yield hf_name, hf_shape


def _is_added(name: str) -> bool:
    """Whether a parameter is of a memory, and begins fresh on a model without one."""
    return name.startswith(MEMORY) or is_adapter(name)


class ImportedWeights:
    """A run's initial parameters: from a Llama's folder, and the others from `fresh`.

    Args:
        folder: the Llama, checked against `config`.
        config: the run's model.
        new_heads: what heads that the folder lacks are: copies of its last layer, or fresh.
        tensor_rank: this rank's position among `tensor_size` tensor-parallel ranks.
        tensor_size: tensor-parallel size.
    """

    def __init__(
        self,
        folder: LlamaFolder,
        config: ModelConfig,
        *,
        new_heads: NewHeads = "copy",
        tensor_rank: int = 0,
        tensor_size: int = 1,
    ) -> None:
        self.folder = folder
        self.config = config
        self.new_heads = new_heads
        self._tensor_rank = tensor_rank
        self._tensor_size = tensor_size

    def __call__(self, name: str, fresh: Callable[[], Tensor]) -> Tensor:
        """This rank's part of a parameter.

        Args:
            name: full parameter name.
            fresh: gives this rank's part of the parameter in an untrained model.

        Returns:
            float32 tensor on the CPU.
        """
        if _is_added(name) and not self.folder.holds(name, self.config):
            return fresh()
        head = head_of(name)
        if not self.folder.holds(name, self.config):
            linear = name.endswith(LINEAR)
            if self.new_heads == "fresh" and not (linear and head == 1):
                return fresh()
            if linear:
                return self._part(name, torch.eye(self.config.hidden_size))
            name = name.replace(f"heads.layers.{head}.", "heads.layers.1.", 1)
            if name == own_unembedding(head):
                name = "heads.readout.weight"
        parts = [self.folder.tensor(hf_name) for hf_name in hf_names(name, self.config)]
        if parts[0].shape[0] < self._rows(name):
            return self._padded(parts[0], fresh())
        return self._part(name, join(name, parts, self.config))

    def _part(self, name: str, whole: Tensor) -> Tensor:
        part = take_slice(whole, placement_of(name), self._tensor_rank, self._tensor_size)
        return part.to(torch.float32, copy=True)

    def _rows(self, name: str) -> int:
        vocabulary = (
            "trunk.embedding.weight",
            "heads.readout.weight",
            own_unembedding(head_of(name)),
        )
        return self.config.vocab_size if name in vocabulary else 0

    def _padded(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """This rank's rows of an embedding: those of the file, then fresh ones."""
        start = self._tensor_rank * fresh.shape[0]
        rows = stored[start : start + fresh.shape[0]]
        fresh[: rows.shape[0]] = rows.to(fresh.dtype)
        return fresh


def _last_head(names: Iterable[str]) -> int:
    """The number of the last head that has a tensor of its own; 1 where none has."""
    found = (_OF_A_HEAD.match(name) for name in names)
    return max((int(match[1]) for match in found if match), default=1)


def _model_files(directory: Path) -> list[Path]:
    """The safetensors files of the Llama itself."""
    single, index = directory / MODEL_NAME, directory / MODEL_INDEX_NAME
    if single.is_file():
        return [single]
    try:
        return [directory / name for name in sorted(set(read_weight_map(index).values()))]
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has neither {MODEL_NAME} nor {MODEL_INDEX_NAME}; load the model with "
            "transformers and save it again by save_pretrained, which writes them"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{index} cannot be read ({reason(error)}); give a whole model"
        ) from error


def _tensor_names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; give a whole model")
    try:
        return open_tensors(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}); give a whole model"
        ) from error


def _plain(value: Any) -> Any:
    return value.parameters() if isinstance(value, RopeScaling) else value


def _shown(value: Any) -> str:
    """A value as YAML in one line."""
    plain = _plain(value)
    if isinstance(plain, dict):
        return "{" + ", ".join(f"{key}: {part}" for key, part in plain.items()) + "}"
    return "null" if plain is None else str(plain)


def _setting(key: str, value: Any) -> str:
    setting = f"model.{key}={_shown(value)}"
    return f"'{setting}'" if " " in setting else setting
