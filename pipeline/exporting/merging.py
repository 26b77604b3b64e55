"""A checkpoint's weights as a model without adapters has them, which is what is exported."""

from pathlib import Path

from torch import Tensor

from model.config import ModelConfig
from model.memory.adapters import adapters_of, is_adapter
from pipeline.checkpoint.sharded_tensors import StateFiles


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The same model with its adapters' products added to its weights."""
    if config.memory is None or not config.memory.adapter_rank:
        return config
    memory = config.memory.model_copy(update={"adapter_rank": 0})
    return config.model_copy(update={"memory": memory})


class MergedFiles(StateFiles):
    """Files whose weights are read as W + alpha / r * B A; see `model.memory.adapters`.

    Args:
        directory: where they lie.
        config: sizes of the model they are of, its adapters among them.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        super().__init__(directory, config)
        memory, self._scale = config.memory, 0.0
        if memory is not None and memory.adapter_rank:
            self._scale = memory.adapter_alpha / memory.adapter_rank

    def names(self) -> list[str]:
        """Parameters that the files hold, but for those of adapters."""
        return [name for name in super().names() if not is_adapter(name)]

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's whole weight with its adapter's product, or a moment of its own."""
        whole = super().whole(kind, name)
        adapters = adapters_of(name)
        if kind != "weight" or adapters is None or adapters[0] not in self._shapes:
            return whole
        first, second = (StateFiles.whole(self, kind, adapter) for adapter in adapters)
        return whole + self._scale * second @ first
