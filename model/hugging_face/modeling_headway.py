"""A Llama with several heads for transformers; a copy of this file lies in every export.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(...)                    # the next-token model, as a plain Llama
    model.generate(..., num_heads=4)       # the same text in fewer forwards, drafted by the heads
    model.generate(..., decoder="dsbd")    # the best of beams; where Headway's packages are
    model.all_head_logits(input_ids)       # [batch, seq, heads, vocabulary]
    model(input_ids, labels=input_ids)     # the loss of all heads, for training on

Head k at position t predicts token t+k (Gloeckle et al. 2024). The last of the Llama's layers is
head 1; the extra heads read what that layer reads, and all share the final norm and `lm_head`.
Other kinds, by keys of config.json:

    head_layers    layers of each head, so the last so many of the Llama's are head 1
    head_kind      "causal": head k reads what head k-1 gives; "anticausal": what head k+1 gives,
                   and all heads are the last layers of the Llama; "linear": a matrix each, and a
                   class of its own, since the next token passes one, too
    lm_head        "replicated": an unembedding for each head

It imports torch, safetensors and transformers (4.56 and newer) only, and is one file, since it
travels with every export and is to be read before it is trusted. Part of Headway, Apache-2.0.
"""

import copy
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    PretrainedConfig,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.utils import cached_file, can_return_tuple

_INDEX_NAME = "all_heads.safetensors.index.json"
_RECORD_NAME = "headway.json"
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_HEAD_KINDS = ("parallel", "causal", "anticausal", "linear")
_OF_HEADS = ("extra_heads.", "extra_lm_heads.", "model.norm.projection.")
_IGNORED = -100
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Arguments of generate that stand for another way of decoding, or for a text begun elsewhere.
_WITHOUT_DRAFTS = (
    "assistant_model",
    "custom_generate",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "synced_gpus",
)
# What shapes a distribution by its values alone, and so may be applied to those of drafts, too.
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass
class HeadwayOutput(CausalLMOutputWithPast):
    """What `forward` with labels gives.

    Attributes:
        head_losses: `[heads]` of each head, without gradients; `loss` is their weighted mean.
    """

    head_losses: Tensor | None = None


class HeadwayForCausalLM(LlamaForCausalLM):
    """Trunk and head 1 as a Llama, and the extra heads beside it.

    Args:
        config: a Llama's, with `future_tokens` = n, the number of heads; and, where they are not
            all 1, `head_weights`, the weight of each head's loss, head 1 first.

    Attributes:
        extra_heads: by number, heads that the next token does not pass: a layer, a list of layers
            or a matrix.
        extra_lm_heads: by number, unembeddings of heads 2 .. n where they have their own.
    """

    # Without it save_pretrained writes this file only if an Auto class has loaded the model.
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # transformers.Trainer takes for predictions whatever it is not told to ignore.
        config.keys_to_ignore_at_inference = ["past_key_values", "head_losses"]
        extra = range(2, self.num_heads + 1)
        anticausal = self._head_kind == "anticausal"
        self.extra_heads = nn.ModuleDict(
            {str(k): self._new_head(k) for k in extra if not anticausal}
        )
        replicated = getattr(config, "lm_head", "shared") == "replicated"
        sizes = config.hidden_size, config.vocab_size
        self.extra_lm_heads = nn.ModuleDict(
            {str(k): nn.Linear(*sizes, bias=False) for k in extra if replicated}
        )
        self.post_init()

    def _new_head(self, k: int) -> nn.Module:
        """One of the extra heads."""
        # In a cache their layers follow those of the Llama.
        each = self._head_layers
        first = self.config.num_hidden_layers + (k - 2) * each
        layers = [LlamaDecoderLayer(self.config, first + index) for index in range(each)]
        return layers[0] if each == 1 else nn.ModuleList(layers)

    @property
    def _head_kind(self) -> str:
        kind = getattr(self.config, "head_kind", "parallel")
        if kind not in _HEAD_KINDS:
            raise ValueError(f"config.head_kind={kind!r} must be one of {', '.join(_HEAD_KINDS)}")
        return str(kind)

    @property
    def _head_layers(self) -> int:
        return int(getattr(self.config, "head_layers", 1))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As of any model of transformers.

        Raises:
            ValueError: tensors of an extra head are missing.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        # transformers 4 would write "auto" into the config.
        dtypes: dict[str, Any] = {
            key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs
        }
        config = kwargs.pop("config", None)
        if not isinstance(config, PretrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(
                source, return_unused_kwargs=True, **kwargs
            )
            kwargs |= where
        kwargs |= dtypes
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
        missing = {key for key in info["missing_keys"] if key.startswith(_OF_HEADS)}
        if index is not None:  # transformers 4 believes it
            missing |= _not_in_files(pretrained_model_name_or_path, Path(index), where)
        if lost := sorted(missing):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {lost[0]} and {len(lost) - 1} more tensors "
                "of its extra heads; export it again, or load it as a plain Llama without "
                "trust_remote_code"
            )
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As of any model of transformers; all heads go into the files of the Llama.

        What an export that lay there says of its own files is removed: its heads are older.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            for name in (_INDEX_NAME, _RECORD_NAME):
                Path(save_directory, name).unlink(missing_ok=True)

    @property
    def num_heads(self) -> int:
        """n, head 1 included."""
        return int(getattr(self.config, "future_tokens", 1))

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
        _refuse_cache(kwargs.get("past_key_values"))
        run = self._run_trunk(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs
        )
        heads = range(2, self.num_heads + 1)
        logits = [self._readout(self._run_head(k, run), k) for k in heads]
        return torch.stack([self.lm_head(run.output.last_hidden_state), *logits], dim=2)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As of a Llama; with labels the loss of all heads.

        The loss is the mean of the heads' losses, weighted by `config.head_weights`. Head k's
        labels are these shifted by k, with -100 where there is nothing to learn. Each head's loss
        is the mean over its own targets; given `num_items_in_batch`, as transformers.Trainer does,
        it is their sum divided by that, the same for all heads, so that parts of a batch add up.

        Memory: logits of head 1 stay until backward, as in a Llama. Those of the others are
        dropped, and computed again in backward, head by head: there is one set more, for any n.

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, 0 where a text is padded.
            position_ids: `[batch, seq]`.
            past_key_values: a cache; not with labels.
            inputs_embeds: `[batch, seq, hidden]`, in place of tokens.
            labels: `[batch, seq]`, the tokens themselves or -100.
            use_cache: whether to keep one; not with labels.
            logits_to_keep: as of a Llama; with labels there are always all.
            kwargs: what else a Llama takes.

        Returns:
            A Llama's output; with labels a `HeadwayOutput`, its logits those of head 1.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if labels is None or self.num_heads == 1:
            return super().forward(
                past_key_values=past_key_values,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **inputs,
                **kwargs,
            )
        _refuse_cache(past_key_values)
        items = kwargs.pop("num_items_in_batch", None)
        run = self._run_trunk(use_cache=False, **inputs, **kwargs)
        logits = self.lm_head(run.output.last_hidden_state)
        losses = [_head_loss(logits, labels, 1, items)]
        for k in range(2, self.num_heads + 1):
            hidden = self._run_head(k, run)
            losses.append(checkpoint(self._loss_of, hidden, labels, k, items, use_reentrant=False))
        each = torch.stack([loss.to(logits.device) for loss in losses])
        weights = each.new_tensor(self._head_weights())
        return HeadwayOutput(
            loss=(weights * each).sum() / weights.sum(),
            logits=logits,
            hidden_states=run.output.hidden_states,
            attentions=run.output.attentions,
            head_losses=each.detach(),
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        *args: Any,
        num_heads: int | None = None,
        decoder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of any model of transformers; heads 2 .. `num_heads` draft tokens for head 1.

        Greedy texts are those without drafts, token for token (as far as a forward over several
        positions has the logits of several forwards); sampled ones have the same distribution, but
        another course of random numbers. Processors, criteria and streamers see every token as
        they do without drafts. All rows of a batch go on together: the first draft that is wrong in
        any of them ends a block, so drafts are for few rows. The cache is always a dynamic one.

        With `decoder`, which needs Headway's packages, texts are those of its command `python -m
        model.generate --decoder`: "beam", "dsbd" or "mtad" (lossy), with the settings `beam_width`,
        `length_penalty`, `distinct_beams`, `width_threshold`, `min_width`, `one_beam`, `tau` and
        `candidates`; `seed` (0) of the first row, one more for each of the next; and another model
        that drafts instead of the heads, `draft_model`, `drafts` (4) tokens.

        Args:
            inputs: `[batch, seq]` prompts, padded on the left.
            generation_config: as ever.
            logits_processor: as ever.
            stopping_criteria: as ever.
            args: further arguments by position.
            num_heads: how many heads to use; None or 1 = no drafts, with `decoder` None = all.
            decoder: a decoder of Headway's packages.
            kwargs: as ever; settings of the decoder.

        Raises:
            ValueError: there are not so many heads; or drafts or a decoder do not go with another
                argument.
            ImportError: there is a decoder, and Headway's packages are not installed.
        """
        heads = 1 if num_heads is None else num_heads
        if not isinstance(heads, int) or not 1 <= heads <= self.num_heads:
            raise ValueError(
                f"num_heads={num_heads} must be from 1 to {self.num_heads}, the heads of this "
                "model; 1 is plain decoding"
            )
        if decoder is not None:
            kwargs["custom_generate"] = _installed().custom_generate(decoder, num_heads, kwargs)
        if heads == 1 or decoder is not None:
            return super().generate(
                inputs, generation_config, logits_processor, stopping_criteria, *args, **kwargs
            )
        for name in _WITHOUT_DRAFTS:
            if (value := kwargs.get(name)) is not None and value is not False:
                raise ValueError(_refusal(heads, name))
        # Newer versions hand neither tokenizer nor streamer on beside custom_generate.
        tokenizer, streamer = kwargs.pop("tokenizer", None), kwargs.get("streamer")
        configs = (generation_config, self.generation_config)
        stops = [kwargs.get("stop_strings"), *(getattr(c, "stop_strings", None) for c in configs)]
        if tokenizer is not None and any(stops):
            kwargs["stop_strings"] = None
            ours = StopStringCriteria(tokenizer, next(filter(None, stops)))
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), ours])

        def decode(model: HeadwayForCausalLM, input_ids: Tensor, **prepared: Any) -> Any:
            text = _Text(input_ids, heads, **prepared | {"streamer": streamer})
            mask = prepared.get("attention_mask")
            return _decode(_Reader(model, heads, mask, text), text)

        return super().generate(
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            *args,
            custom_generate=decode,
            **kwargs,
        )

    def _run_trunk(self, **inputs: Any) -> "_Run":
        """Run trunk and head 1.

        Args:
            inputs: of a Llama's `forward`.
        """
        layers, each = self.config.num_hidden_layers, self._head_layers
        watched = {0: self.model.norm, 1: self.model.layers[layers - each]}
        if self._head_kind == "anticausal":  # what head k gives is what the layer after it reads
            heads = range(2, self.num_heads + 1)
            watched |= {k: self.model.layers[layers - (k - 1) * each] for k in heads}
        seen: dict[int, Any] = {}
        thread = get_ident()

        def watch(place: int, module: nn.Module) -> Any:
            def look(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
                if get_ident() == thread:  # other threads may be generating, too
                    seen[place] = positional, named

            return module.register_forward_pre_hook(look, with_kwargs=True)

        hooks = [watch(place, module) for place, module in watched.items()]
        try:
            output = self.model(return_dict=True, **inputs)
        finally:
            for hook in hooks:
                hook.remove()
        given = {k: _first(*called) for k, called in seen.items() if k > 1}
        given[1] = _first(*seen[0])
        positional, named = seen[1]
        return _Run(output, positional, named, given)

    def _run_head(self, k: int, run: "_Run") -> Tensor:
        """Output `[batch, seq, hidden]` of head k from 2 on, before the shared norm.

        Those before it have been run where it reads what they give.
        """
        if k in run.given:
            return run.given[k]
        head = self.extra_heads[str(k)]
        hidden, others = _first(run.positional, run.named), run.positional[1:]
        if self._head_kind == "causal":
            hidden = run.given[k - 1]
        named = {key: value for key, value in run.named.items() if key != "hidden_states"}
        for layer in head if isinstance(head, nn.ModuleList) else [head]:
            hidden = layer(hidden, *others, **named)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        run.given[k] = hidden
        return hidden

    def _readout(self, hidden: Tensor, k: int) -> Tensor:
        """Logits of what head k from 2 on gave, through the shared norm and its unembedding."""
        own = str(k) in self.extra_lm_heads
        return (self.extra_lm_heads[str(k)] if own else self.lm_head)(self._norm(hidden))

    def _norm(self, hidden: Tensor) -> Tensor:
        return self.model.norm(hidden)

    def _loss_of(self, hidden: Tensor, labels: Tensor, k: int, items: Any) -> Tensor:
        return _head_loss(self._readout(hidden, k), labels, k, items)

    def _head_weights(self) -> list[float]:
        weights = getattr(self.config, "head_weights", None) or [1.0] * self.num_heads
        if len(weights) != self.num_heads or not any(weights):
            raise ValueError(
                f"config.head_weights={list(weights)} must be {self.num_heads} weights, one for "
                "each head of this model, and not all 0; without it all are 1"
            )
        return list(weights)


class HeadwayConfig(LlamaConfig):
    """A Llama's, of a model that is none: its heads are linear."""

    model_type = "headway"


class _LinearHead1(LlamaRMSNorm):
    """Head 1 as a matrix, and the final norm after it."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.projection = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., hidden]` to the same."""
        return super().forward(self.projection(hidden_states))


class HeadwayLinearForCausalLM(HeadwayForCausalLM):
    """A model whose heads are matrices, head 1 among them.

    Args:
        config: as of `HeadwayForCausalLM`.
    """

    config_class = HeadwayConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.norm = _LinearHead1(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def _new_head(self, k: int) -> nn.Module:
        return nn.Linear(self.config.hidden_size, self.config.hidden_size, bias=False)

    def _run_head(self, k: int, run: "_Run") -> Tensor:
        return self.extra_heads[str(k)](run.given[1])

    def _norm(self, hidden: Tensor) -> Tensor:
        norm: Any = self.model.norm
        return LlamaRMSNorm.forward(norm, hidden)


class _Run(NamedTuple):
    """A forward of the trunk.

    Attributes:
        output: of the Llama without its unembedding, head 1's.
        positional: what head 1, and so every head, is called with: the trunk's output first.
        named: masks, positions and the cache.
        given: what heads gave, by number, before the norm; of linear heads, at 1, what they read.
    """

    output: Any
    positional: tuple[Any, ...]
    named: dict[str, Any]
    given: dict[int, Tensor]


class _Reader:
    """Trunk and heads over the new tokens of a batch, with a cache of both.

    Args:
        model: the model.
        heads: how many of its heads to run.
        mask: `[batch, seq]` of the prompts, 0 where they are padded; None: nowhere.
        text: the prompts.
    """

    def __init__(
        self, model: HeadwayForCausalLM, heads: int, mask: Tensor | None, text: "_Text"
    ) -> None:
        self.cache = DynamicCache()
        self._model = model
        self._numbers = range(2, heads + 1)
        rows, prompt = text.tokens.shape
        if mask is None:
            mask = text.tokens.new_ones(rows, prompt)
        whole = F.pad(mask.long(), (0, text.max_length - prompt), value=1)
        self._positions = (whole.cumsum(1) - 1).clamp(min=0)
        # Attention without a mask is faster, and the same where nothing is padded.
        self._mask = None if bool(mask.all()) else whole

    def read(self, tokens: Tensor, keep: int) -> Tensor:
        """Run over new tokens `[batch, seq]`; logits `[batch, keep, V]` of head 1 at the last."""
        start = self.cache.get_seq_length()
        stop = start + tokens.shape[1]
        run = self._model._run_trunk(
            input_ids=tokens,
            attention_mask=None if self._mask is None else self._mask[:, :stop],
            position_ids=self._positions[:, start:stop],
            past_key_values=self.cache,
            use_cache=True,
        )
        self._hidden = [self._model._run_head(k, run)[:, -keep:] for k in self._numbers]
        return self._model.lm_head(run.output.last_hidden_state[:, -keep:])

    def draft_logits(self, column: int) -> Tensor:
        """`[batch, heads - 1, V]` of heads 2 and up, at one of the positions that were kept."""
        hidden = zip(self._numbers, self._hidden, strict=True)
        return torch.stack([self._model._readout(h[:, column], k) for k, h in hidden], dim=1)

    def forget(self, count: int) -> None:
        """Drop the last `count` positions."""
        if count:
            self.cache.crop(-count)


class _Text:
    """A batch of texts that grow, and who looks at every token of them.

    Args:
        prompts: `[batch, seq]`.
        heads: how many heads are used.
        streamer: gets every token.
        logits_processor: changes head 1's logits.
        stopping_criteria: say which rows have ended.
        generation_config: what `generate` was asked for.
        others: what else `generate` has prepared.

    Attributes:
        tokens: `[batch, seq]` so far.
        done: whether all rows have ended.
        max_length: of `tokens`.
    """

    def __init__(
        self,
        prompts: Tensor,
        heads: int,
        *,
        streamer: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **others: Any,
    ) -> None:
        config = generation_config
        if (mode := config.get_generation_mode()) not in _MODES:
            raise ValueError(_refusal(heads, f"what makes it {mode.value}"))
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                raise ValueError(_refusal(heads, name))
        if others.get("synced_gpus"):  # ranks would make different numbers of forwards
            raise ValueError(_refusal(heads, "synced_gpus"))
        self.tokens = prompts
        self.done = False
        self.max_length = int(config.max_length)
        self._unfinished = torch.ones_like(prompts[:, 0], dtype=torch.bool)
        self._pad = _padding(config, stopping_criteria)
        self._streamer = streamer
        self._processor = logits_processor
        self._warpers = LogitsProcessorList(p for p in logits_processor if isinstance(p, _WARPERS))
        self._criteria = stopping_criteria
        self._sample = bool(config.do_sample)
        wanted = config.return_dict_in_generate
        self._is_dict = bool(wanted)
        self._scores: Any = () if wanted and config.output_scores else None
        self._logits: Any = () if wanted and config.output_logits else None

    def append(self, logits: Tensor, draft: Tensor | None, proposal: Tensor | None) -> bool:
        """Choose the next token of every row.

        Args:
            logits: `[batch, V]` of head 1.
            draft: `[batch]` what was drafted for it; None: nothing.
            proposal: `[batch, V]` the distribution that the draft was drawn from; None: greedy.

        Returns:
            Whether the texts go on, and the draft was right in all rows that do.
        """
        logits = logits.to(torch.float32, copy=True)  # processors may write into it
        scores = self._processor(self.tokens, logits)
        if self._scores is not None:
            self._scores += (scores,)
        if self._logits is not None:
            self._logits += (logits,)
        if not self._sample:
            tokens = scores.argmax(dim=-1)
        elif draft is None or proposal is None:
            tokens = torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1)
        else:
            tokens = _accept_or_draw(scores.softmax(dim=-1), draft, proposal)
        if self._pad is not None:
            tokens = torch.where(self._unfinished, tokens, self._pad)
        self.tokens = torch.cat([self.tokens, tokens.unsqueeze(1)], dim=1)
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        self._unfinished = self._unfinished & ~self._criteria(self.tokens, self._scores)
        self.done = not bool(self._unfinished.any())
        if draft is None or self.done:
            return False
        right = tokens == draft
        if self._pad is not None:  # else what follows an ended row is looked at, too
            right = right | ~self._unfinished
        return bool(right.all())

    def draft(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts for what follows the next token, as many as there is room for.

        Args:
            logits: `[batch, heads - 1, V]`.

        Returns:
            `[batch, drafts]` tokens, and the distributions they were drawn from.
        """
        logits = logits[:, : self.max_length - self.tokens.shape[1] - 1].float()
        if not self._sample:
            return logits.argmax(dim=-1), None
        shaped = [self._warpers(self.tokens, column) for column in logits.unbind(1)]
        if not shaped:
            return self.tokens[:, :0], None
        proposals = torch.stack(shaped, dim=1).softmax(dim=-1)
        tokens = torch.multinomial(proposals.flatten(0, 1), 1).view(proposals.shape[:2])
        return tokens, proposals

    def output(self, cache: DynamicCache) -> Any:
        """What `generate` gives back."""
        if self._streamer is not None:
            self._streamer.end()
        if not self._is_dict:
            return self.tokens
        return GenerateDecoderOnlyOutput(
            sequences=self.tokens, scores=self._scores, logits=self._logits, past_key_values=cache
        )


def _decode(reader: _Reader, text: _Text) -> Any:
    """Draft with the heads, verify with head 1, until all rows have ended.

    One forward runs over the last token, which no forward has seen yet, and the drafts after it.
    It says how many drafts are right, what follows them, and at the last right one the heads draft
    again. Rows go on together: the first draft that is wrong in any of them ends the block.
    """
    logits = reader.read(text.tokens, keep=1)
    drafts, proposals = text.tokens[:, :0], None
    while True:
        right = 0
        while text.append(logits[:, right], *_at(right, drafts, proposals)):
            right += 1
        reader.forget(logits.shape[1] - 1 - right)
        if text.done:
            return text.output(reader.cache)
        drafts, proposals = text.draft(reader.draft_logits(right))
        pending = torch.cat([text.tokens[:, -1:], drafts], dim=1)
        logits = reader.read(pending, keep=pending.shape[1])


def _at(
    column: int, drafts: Tensor, proposals: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """A column of drafts, and of their distributions; None past the last."""
    if column == drafts.shape[1]:
        return None, None
    return drafts[:, column], None if proposals is None else proposals[:, column]


def _accept_or_draw(target: Tensor, draft: Tensor, proposal: Tensor) -> Tensor:
    """Speculative sampling: tokens of the target's distribution, drafts where possible.

    A draft d is kept with probability min(1, p(d) / q(d)); else the token is drawn from the
    positive part of p - q (Leviathan et al. 2023, Chen et al. 2023).

    Args:
        target: `[batch, V]` p.
        draft: `[batch]` tokens drawn from q.
        proposal: `[batch, V]` q.
    """
    chosen = draft.unsqueeze(1)
    wanted, drawn = target.gather(1, chosen), proposal.gather(1, chosen)
    keep = torch.rand_like(wanted) * drawn < wanted
    rest = (target - proposal).clamp(min=0)
    # Nothing is left only if p = q, up to rounding.
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, target)
    return torch.where(keep, chosen, torch.multinomial(rest, 1)).squeeze(1)


def _padding(config: Any, criteria: StoppingCriteriaList) -> int | None:
    """What is written into rows that have ended; None: what the model says, as `generate` does."""
    if not any(hasattr(one, "eos_token_id") for one in criteria):
        return None
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return int(ends[0] if isinstance(ends, list | tuple) else ends)


def _head_loss(logits: Tensor, labels: Tensor, k: int, items: Any) -> Tensor:
    """Cross-entropy of head k.

    Args:
        logits: `[batch, seq, V]`.
        labels: `[batch, seq]`, position t's own token at t.
        k: the head; at t its target is the label at t + k.
        items: what to divide the sum by; None: the number of targets.
    """
    targets = F.pad(labels, (0, k), value=_IGNORED)[:, k:].to(logits.device)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED, reduction="sum"
    )
    if items is None:
        items = (targets != _IGNORED).sum().clamp(min=1)
    return total / torch.as_tensor(items, device=total.device)


def _first(positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer reads, of the arguments it is called with."""
    found: Tensor = positional[0] if positional else named["hidden_states"]
    return found


def _not_in_files(source: Any, index: Path, where: dict[str, Any]) -> set[str]:
    """Tensors of extra heads that the index names and its files do not hold."""
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = {name for name in places if name.startswith(_OF_HEADS)}
    for file in {places[name] for name in names}:
        with safe_open(cached_file(source, file, **where), "pt") as tensors:
            names -= set(tensors.keys())
    return names


def _installed() -> Any:
    """Decoders that do not travel with exports."""
    try:
        return import_module("model.writing.class_decoding")
    except ImportError as error:
        raise ImportError(
            f"decoder needs Headway's packages, which are not all here ({error}): install them "
            "beside transformers (pip install -e CHECKOUT), or leave decoder out; num_heads and "
            "num_beams need nothing"
        ) from error


def _refuse_cache(cache: Any) -> None:
    if cache is not None:
        raise ValueError(
            "heads 2 and up keep no cache between calls; pass whole texts, no past_key_values"
        )


def _refusal(heads: int, argument: str) -> str:
    return (
        f"num_heads={heads} drafts for greedy decoding and sampling of texts from their beginning "
        f"on one device group; leave out {argument}, or num_heads"
    )
