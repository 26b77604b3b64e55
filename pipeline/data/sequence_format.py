"""How the splits of a run's shards become sequences; the same for training and validation."""

from data_prep.loading.sequences import SequenceFormat
from pipeline.config.run_config import RunConfig


def sequence_format(config: RunConfig) -> SequenceFormat:
    """How the streams of the run's splits become sequences."""
    return SequenceFormat(
        sequence_length=config.data.sequence_length,
        future_tokens=config.model.future_tokens,
        packing=config.data.packing,
        documents=config.data.document_mask,
    )
