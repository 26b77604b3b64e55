"""Folders of models as people publish them: a tiny Llama with tokenizer files of several kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.support.tiny_llama import save_llama

# 256 bytes, and from 256 on these.
SPECIAL = ("<s>", "</s>", "<pad>", "<|end_of_turn|>")
BOS, EOS, PAD, END_OF_TURN = range(256, 260)
# What an export of any model has of its own.
_OWN_KEYS = ("architectures", "auto_map", "future_tokens", "transformers_version", "_name_or_path")
_MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
    "{{ message['content'] }}<|end_of_turn|>{% endfor %}"
)


def tokenizer(*, adds_bos: bool = True, special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """Plain bytes with special tokens; `<s>` goes before each text, as in most Llamas."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    if adds_bos:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
                ),
            ]
        )
    return backend


def _save(folder: Path, *, ids: dict[str, Any], adds_bos: bool = True, **named: Any) -> None:
    save_llama(folder, **ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(adds_bos=adds_bos), **named)
    fast.save_pretrained(folder)


def _write(folder: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)


def _edit(folder: Path, name: str, **changes: Any) -> None:
    _write(folder, name, json.loads((folder / name).read_text()) | changes)


def _base(folder: Path) -> None:
    """A base model: `<s>`, `</s>`, no padding, nothing else."""
    ids = {"bos_token_id": BOS, "eos_token_id": EOS}
    _save(folder, ids=ids, bos_token="<s>", eos_token="</s>")


def _chat(folder: Path) -> None:
    """A chat model: two ends, sampling by default, a template in a file of its own."""
    ids = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}
    _save(folder, ids=ids, bos_token="<s>", eos_token="<|end_of_turn|>", pad_token="<pad>")
    _write(folder, "chat_template.jinja", TEMPLATE)
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 100}
    _write(folder, "generation_config.json", ids | defaults)


def _older_chat(folder: Path) -> None:
    """As transformers 4 saved it: template, tokens and no length limit in tokenizer_config.json."""
    _base(folder)
    _edit(
        folder,
        "tokenizer_config.json",
        chat_template=TEMPLATE,
        model_max_length=1000000000000000019884624838656,
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder={
            str(BOS + place): AddedToken(name, special=True).__getstate__() | {"special": True}
            for place, name in enumerate(SPECIAL)
        },
    )
    _write(folder, "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})


def _several_templates(folder: Path) -> None:
    """Named templates, and names of inputs that are not the usual ones."""
    _base(folder)
    templates = [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "tools: " + TEMPLATE},
    ]
    names = ["input_ids", "attention_mask", "position_ids"]
    _edit(folder, "tokenizer_config.json", chat_template=templates, model_input_names=names)


def _end_as_padding(folder: Path) -> None:
    """No beginning of text, the end as padding, more tokens beside the vocabulary."""
    ids = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    _save(
        folder,
        ids=ids,
        adds_bos=False,
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|end_of_turn|>"],
    )


def _silent(folder: Path) -> None:
    """Its config.json says nothing of tokens, so that they are what transformers takes."""
    _save(folder, ids={}, bos_token="<s>", eos_token="</s>")
    content = json.loads((folder / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        content.pop(key, None)
    _write(folder, "config.json", content)
    (folder / "generation_config.json").unlink()


ORIGINALS: dict[str, Callable[[Path], None]] = {
    "base": _base,
    "chat": _chat,
    "older-chat": _older_chat,
    "several-templates": _several_templates,
    "end-as-padding": _end_as_padding,
    "silent": _silent,
}


def said_by(folder: Path) -> dict[str, Any]:
    """All that transformers makes of a folder, but for the weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = AutoTokenizer.from_pretrained(folder)
    config = {key: v for key, v in model.config.to_dict().items() if key not in _OWN_KEYS}
    defaults = model.generation_config.to_dict()
    defaults.pop("transformers_version", None)
    prompt = torch.tensor([text("def f(x):").input_ids])
    torch.manual_seed(3)  # some sample by default
    said = {
        "config": config,
        "generation": {key: v for key, v in defaults.items() if key != "_from_model_config"},
        "generated": model.generate(prompt, max_new_tokens=12).tolist(),
        "special": text.special_tokens_map,
        "ids": (text.bos_token_id, text.eos_token_id, text.pad_token_id),
        "added": {number: str(token) for number, token in text.added_tokens_decoder.items()},
        "inputs": text.model_input_names,
        "longest": text.model_max_length,
        "encoded": dict(text("a <s> é</s>")),
        "template": text.chat_template,
    }
    if text.chat_template is not None:
        said["chat"] = text.apply_chat_template(_MESSAGES, tokenize=False)
    return said
