"""An early-exit adapter as an export: what it takes of a model, and which model that was.

A run with `train.freeze: early_exit` has the first l layers of a model, its embedding and its LM
head, all of which stay, and one head, which it trains. Its export is a Llama of these layers, to be
read like any other, and `early_exit.json` beside it says which model the head drafts for.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation.bounded_files import read_bounded
from foundation.shown_text import printable
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hugging_face.importing import LlamaFolder
from model.hugging_face.names import hf_names
from model.structure.head_kinds import next_token_heads
from model.structure.parameter_shapes import head_of, parameter_shapes

EARLY_EXIT_NAME = "early_exit.json"
_MOST_BYTES = 1 << 16
_PIECE = 1 << 22  # elements


class EarlyExit(BaseModel):
    """Which model an adapter drafts for, and where it leaves it.

    Attributes:
        layer: l, how many of its layers the adapter stands on.
        model: name of the model's folder.
        model_layers: layers that its next token passes.
        model_weights: hash of what these consist of, see `fingerprint`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["headway-early-exit"] = "headway-early-exit"
    version: Literal[1] = 1
    layer: int = Field(gt=0)
    model: str
    model_layers: int = Field(gt=0)
    model_weights: str


class LowerLayers(LlamaFolder):
    """A Llama's folder of which a run takes the first layers, embedding and LM head.

    What the adapter begins as, if it is to be a copy, is the layer above these.
    """

    @property
    def trunk_layers(self) -> int:
        """The layers that an adapter may stand on: all below the model's own heads."""
        heads = self.sizes.heads
        kind = heads.get("head_kind", "parallel")
        each = 0 if kind == "linear" else heads.get("head_layers", 1)
        return self.sizes.layers - each * len(next_token_heads(kind, self.heads))

    def holds(self, name: str, config: ModelConfig) -> bool:
        """Whether the run takes a parameter from here whatever its adapter begins as."""
        del config
        return head_of(name) == 0

    def differences(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of the model's configuration that do not fit, with the value each must have."""
        wanted = {**self.sizes.keys, "vocab_size": self.sizes.vocab_size}
        return {key: value for key, value in wanted.items() if getattr(config, key) != value}

    def check(self, config: ModelConfig) -> None:
        """Check that an adapter of these sizes can stand on the folder's model.

        Raises:
            ConfigError: there are too few layers, or a key differs.
            CheckpointError: a tensor is missing, has another shape, or is not a Llama's.
        """
        most = self.trunk_layers
        if config.trunk_layers > most or config.layers > self.sizes.layers:
            raise ConfigError(
                f"model.layers={config.layers} would let train.freeze=early_exit leave "
                f"{self.directory} at layer {config.trunk_layers}, and its trunk has {most} of its "
                f"{self.sizes.layers} layers; set model.layers to at most "
                f"{min(most + config.head_layers, self.sizes.layers)}: the layers up to the exit, "
                f"and {config.head_layers} of the adapter"
            )
        if wanted := self.differences(config):
            raise self._differs(
                config, wanted, f"of which an early exit takes {config.trunk_layers}"
            )
        whole = LlamaFolder(self.directory)
        whole.check(whole.next_token_config())

    def early_exit(self, config: ModelConfig) -> EarlyExit:
        """What an adapter of a run's model says of this folder; reads every tensor once."""
        return EarlyExit(
            layer=config.trunk_layers,
            model=printable(self.directory.name),
            model_layers=self.sizes.layers,
            model_weights=fingerprint(LlamaFolder(self.directory)),
        )


def fingerprint(folder: LlamaFolder) -> str:
    """A hash of a next-token model's weights, the same in every folder that has these values.

    Other heads beside it, the number of files and wider types do not count.
    """
    config = folder.next_token_config()
    digest = xxhash.xxh3_128()
    names = {name for ours in parameter_shapes(config) for name in hf_names(ours, config)}
    for name in sorted(names):
        tensor = folder.tensor(name)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for piece in tensor.flatten().split(_PIECE):
            digest.update(piece.to(torch.float32).numpy())
    return digest.hexdigest()


def read_early_exit(directory: Path) -> EarlyExit:
    """What an adapter's export says of its model.

    Raises:
        CheckpointError: it is not the export of an adapter, or its record is damaged.
    """
    path = directory / EARLY_EXIT_NAME
    try:
        return EarlyExit.model_validate_json(read_bounded(path, _MOST_BYTES))
    except OSError as error:
        raise CheckpointError(
            f"{directory} has no readable {EARLY_EXIT_NAME} ({error.strerror}), so it is not an "
            "early-exit adapter; give the export of a run with train.freeze=early_exit"
        ) from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = printable(".".join(map(str, fault["loc"])))
        raise CheckpointError(
            f"{path} is damaged ({where}: {printable(fault['msg'])}); export again"
        ) from error
