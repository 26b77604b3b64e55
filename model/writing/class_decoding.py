"""What `generate(decoder=...)` of the class that exports carry runs, where the packages are.

The class calls `custom_generate` by its name, also that of an export which an older version wrote.

Legend: B rows, S prompt with its padding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from model.beams.command import beam_decoder, beam_settings
from model.config import ModelConfig
from model.decoding.generation import collect, stream
from model.decoding.sampling import GREEDY, Sampling
from model.errors import ConfigError
from model.hugging_face.config import llama_sizes
from model.inference.network import Network
from model.joint_decoding.command import joint_decoder
from model.writing.asked_decoder import AskedDecoder, SettingError, checked

_DRAFTS = 4
_MOST_DRAFTS = 64
_SEEDS = 1 << 63
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Arguments of generate that stand for another way of decoding, or for what is not built.
_OTHER_ARGUMENTS = (
    *("assistant_model", "custom_generate", "inputs_embeds", "past_key_values", "position_ids"),
    *("stop_strings", "streamer", "synced_gpus"),
)
_OTHER_OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")
# What the distributions here are made by, and what ends texts here.
_KNOWN = (
    *(MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper),
    *(TopKLogitsWarper, TopPLogitsWarper, EosTokenCriteria, MaxLengthCriteria),
)


class _Wanted(NamedTuple):
    """What a call asks for.

    Attributes:
        asked: the decoder.
        seed: of the first row, one more for each of the next.
        num_heads: that are used; None = all.
        draft_model: another model of the same vocabulary that drafts; None = the heads do.
        drafts: tokens that it drafts.
    """

    asked: AskedDecoder
    seed: int
    num_heads: int | None
    draft_model: Any
    drafts: int


def custom_generate(
    decoder: str, num_heads: int | None, arguments: dict[str, Any]
) -> Callable[..., Any]:
    """What `generate` of transformers is to run instead of a loop of its own.

    Texts are those of `python -m model.generate --decoder` with the same settings and seed.

    Args:
        decoder: its name.
        num_heads: that are used; None = all.
        arguments: of `generate`; settings of the decoder are taken out of them.

    Raises:
        ValueError: an argument does not go with decoders.
    """
    for name in _OTHER_ARGUMENTS:
        if (value := arguments.get(name)) is not None and value is not False:
            raise _refusal(decoder, name)
    names = [name for name in AskedDecoder._fields if name in arguments]
    wanted = _Wanted(
        AskedDecoder(decoder, **{name: arguments.pop(name) for name in names}),
        arguments.pop("seed", 0),
        num_heads,
        arguments.pop("draft_model", None),
        arguments.pop("drafts", _DRAFTS),
    )
    _check_wanted(wanted)

    def decode(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        config = prepared["generation_config"]
        _check(decoder, config, [*prepared["logits_processor"], *prepared["stopping_criteria"]])
        try:
            tokens = _tokens(model, wanted, config, input_ids, prepared.get("attention_mask"))
        except (ConfigError, SettingError) as error:
            raise ValueError(str(error)) from error
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=tokens)
        return tokens

    return decode


def _check_wanted(wanted: _Wanted) -> None:
    if type(wanted.seed) is not int or not 0 <= wanted.seed < _SEEDS:
        raise ValueError(f"seed={wanted.seed} must be a whole number from 0 to 2^63 - 1")
    if type(wanted.drafts) is not int or not 1 <= wanted.drafts <= _MOST_DRAFTS:
        raise ValueError(f"drafts={wanted.drafts} must be a whole number from 1 to {_MOST_DRAFTS}")
    if not isinstance(wanted.draft_model, PreTrainedModel | None):
        raise ValueError("draft_model must be a model that transformers has loaded; load it first")
    of_model, of_heads = wanted.draft_model is not None, wanted.num_heads is not None
    if not wanted.asked.drafts and (of_model or of_heads):
        raise ValueError(
            f"decoder={wanted.asked.decoder!r} has no drafts, so it goes without num_heads and "
            "draft_model"
        )
    if of_model and of_heads:
        raise ValueError("draft_model drafts instead of the heads; leave it or num_heads out")


def network_of(model: Any, num_heads: int, name: str) -> Network:
    """A model that transformers has loaded, as decoding runs it: its weights, read once more.

    Args:
        model: a Llama, or one with heads.
        num_heads: that it has, or 1.
        name: what errors call it.

    Raises:
        ConfigError: it is not a Llama of the kind that is built here.
    """
    sizes = llama_sizes(Path(name), model.config.to_dict())
    try:
        config = ModelConfig.model_validate(sizes.model(num_heads))
    except ValidationError as error:
        raise ConfigError(
            f"{name} has a config of no model ({error.errors()[0]['msg']})"
        ) from error
    return Network.read(config, model.state_dict().__getitem__, model.dtype, model.device)


@torch.inference_mode()
def _tokens(
    model: Any, wanted: _Wanted, config: Any, input_ids: Tensor, mask: Tensor | None
) -> Tensor:
    """Prompts `[B, S]` and what follows them, padded on the right."""
    asked, heads = wanted.asked, wanted.num_heads or model.num_heads
    sampling = _sampling(config)
    drafts = heads - 1 if wanted.draft_model is None else wanted.drafts
    asked = checked(asked, sampling, drafts=drafts)
    network, drafter = network_of(model, model.num_heads, "the model"), None
    if wanted.draft_model is not None:
        drafter = network_of(wanted.draft_model, 1, "draft_model")
        if drafter.config.vocab_size != network.config.vocab_size:
            raise SettingError(
                "draft_model",
                f"has a vocabulary of {drafter.config.vocab_size}, the model one of "
                f"{network.config.vocab_size}; give one of the same tokenizer",
            )
    seeds = [(wanted.seed + row) % _SEEDS for row in range(len(input_ids))]
    eos_ids, room = _ends(config), int(config.max_length) - input_ids.shape[1]
    prompts = _prompts(input_ids, mask, network.config.vocab_size)
    if asked.of_beams:
        beams = beam_decoder(
            asked,
            network,
            prompts,
            beam_settings(asked, room, sampling, eos_ids, None),
            seeds,
            drafts=drafts,
            drafter=drafter,
        )
        while beams.going:
            beams.round()
        found = beams.generation().tokens
    else:
        joint = joint_decoder(
            asked,
            network,
            heads=heads,
            drafter=drafter,
            drafts=drafts,
            sampling=sampling,
            eos_ids=eos_ids,
            seeds=seeds,
        )
        pieces = stream(joint, prompts, max_new_tokens=room, eos_id=eos_ids)
        found = collect(pieces, len(prompts)).tokens
    longest, pad = max(map(len, found)), _pad(config, eos_ids)
    padded = [[*tokens, *[pad] * (longest - len(tokens))] for tokens in found]
    return torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], dim=1)


def _check(decoder: str, config: Any, shapers: list[Any]) -> None:
    """See that nothing is asked for that is not built, by an argument or the model's defaults."""
    if (mode := config.get_generation_mode()) not in _MODES:
        raise _refusal(decoder, f"what makes it {mode.value}")
    for name in _OTHER_OUTPUTS:
        if getattr(config, name, False):
            raise _refusal(decoder, name)
    for shaper in shapers:
        if not isinstance(shaper, _KNOWN):
            raise _refusal(decoder, f"what makes a {type(shaper).__name__}")


def _refusal(decoder: str, argument: str) -> ValueError:
    return ValueError(
        f"decoder={decoder!r} continues whole texts by loops of its own, which {argument} does not "
        "go with; leave out one of the two"
    )


def _sampling(config: Any) -> Sampling:
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return GREEDY._replace(repetition_penalty=penalty)
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=penalty,
    )


def _ends(config: Any) -> frozenset[int]:
    ends = config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _pad(config: Any, eos_ids: frozenset[int]) -> int:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    return min(eos_ids, default=0)


def _prompts(input_ids: Tensor, mask: Tensor | None, vocab_size: int) -> list[list[int]]:
    """The tokens of each row without its padding."""
    seen = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[shown.bool()].tolist() for row, shown in zip(input_ids, seen, strict=True)]
    if not prompts or not all(prompts):
        raise SettingError("inputs", "have a row without a token, or no row; give each a token")
    if outside := [token for row in prompts for token in row if not 0 <= token < vocab_size]:
        raise SettingError(
            "inputs",
            f"have token {outside[0]}, and the model knows 0 to {vocab_size - 1}; encode them by "
            "its own tokenizer",
        )
    return prompts
