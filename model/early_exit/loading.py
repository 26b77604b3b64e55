"""Loads an adapter for a model that is loaded, and sees that the two belong together."""

from pathlib import Path

from model.early_exit.network import EarlyExitNetwork
from model.errors import ConfigError
from model.hugging_face.early_exit import fingerprint, read_early_exit
from model.hugging_face.importing import LlamaFolder
from model.hugging_face.loading import open_export
from model.hugging_face.names import head_prefixes
from model.inference.network import Network
from model.inference.weights import read_layers


def load_early_exit(directory: Path, model: Path, network: Network) -> EarlyExitNetwork:
    """The model with the adapter of an export.

    Args:
        directory: the export of a run with `train.freeze: early_exit`.
        model: the folder that the model was loaded from.
        network: the model.

    Raises:
        ConfigError: the adapter belongs to another model.
        CheckpointError: it is none, or damaged.
    """
    wanted = read_early_exit(directory)
    if fingerprint(LlamaFolder(model)) != wanted.model_weights:
        raise ConfigError(
            f"--early-exit {directory} was trained for other weights than those of {model} (its "
            f"model was {wanted.model}, of {wanted.model_layers} layers), so its drafts would be "
            "of another model; give the folder it was trained for, or train an adapter for this one"
        )
    if wanted.layer > network.config.trunk_layers:
        raise ConfigError(
            f"--early-exit {directory} leaves the model at layer {wanted.layer}, and the trunk of "
            f"{model} has {network.config.trunk_layers}; train an adapter on fewer layers"
        )
    with open_export(directory) as export:
        config = export.record.description.model
        prefixes = head_prefixes(1, config)
        adapter = read_layers(config, export.tensor, prefixes, network.dtype, network.device)
    return EarlyExitNetwork(network, wanted.layer, adapter)
