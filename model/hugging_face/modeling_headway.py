"""A Llama with several heads for transformers; a copy of this file lies in every export.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(...)                    # the next-token model, as a plain Llama
    model.all_head_logits(input_ids)       # [batch, seq, heads, vocabulary]

Head k at position t predicts token t+k (Gloeckle et al. 2024). The last of the Llama's layers is
head 1; the extra heads read what that layer reads, and all share the final norm and `lm_head`.

It imports torch and transformers only. Part of Headway, Apache-2.0.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import cached_file

_INDEX_NAME = "all_heads.safetensors.index.json"
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class HeadwayForCausalLM(LlamaForCausalLM):
    """Trunk and head 1 as a Llama, and the extra heads beside it.

    Args:
        config: a Llama's, with `future_tokens` = n, the number of heads.

    Attributes:
        extra_heads: one layer for each of heads 2 .. n, by the head's number.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        last = config.num_hidden_layers - 1
        numbers = range(2, getattr(config, "future_tokens", 1) + 1)
        self.extra_heads = nn.ModuleDict({str(k): LlamaDecoderLayer(config, last) for k in numbers})
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As of any model of transformers.

        Raises:
            ValueError: tensors of an extra head are missing.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, PretrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(
                source, return_unused_kwargs=True, **kwargs
            )
            kwargs |= where
        index = cached_file(
            pretrained_model_name_or_path,
            _INDEX_NAME,
            _raise_exceptions_for_missing_entries=False,
            **where,
        )
        if index is not None:  # not so in a folder that save_pretrained has written
            config = copy.deepcopy(config)
            config.transformers_weights = _INDEX_NAME
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            output_loading_info=True,
            **kwargs,
        )
        if lost := sorted(key for key in info["missing_keys"] if key.startswith("extra_heads.")):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {lost[0]} and {len(lost) - 1} more tensors "
                "of its extra heads; export it again, or load it as a plain Llama without "
                "trust_remote_code"
            )
        return (model, info) if wants_info else model

    def all_head_logits(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits of every head over whole texts, without a cache.

        Args:
            input_ids: `[batch, seq]` tokens.
            attention_mask: `[batch, seq]`, 0 where a text is padded.
            kwargs: what else `forward` of a Llama takes, `position_ids` for one.

        Returns:
            `[batch, seq, heads, vocabulary]`; head k at place k - 1, head 1 as `forward` has it.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError("all_head_logits keeps no cache; pass whole texts, no past_key_values")
        seen: dict[str, Any] = {}

        def look(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.update(positional=positional, named=named)

        # What head 1 is called with is what every head is called with: the trunk's output first.
        head_1 = self.model.layers[self.config.num_hidden_layers - 1]
        hook = head_1.register_forward_pre_hook(look, with_kwargs=True)
        try:
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs
            )
        finally:
            hook.remove()
        logits = [self.lm_head(output.last_hidden_state)]
        for head in self.extra_heads.values():
            hidden = head(*seen["positional"], **seen["named"])
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            logits.append(self.lm_head(self.model.norm(hidden)))
        return torch.stack(logits, dim=2)
