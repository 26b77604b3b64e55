"""The model card of an export: what the model is, what its run measured, how to load it."""

from collections.abc import Sequence
from pathlib import Path

from model.config import ModelConfig
from model.errors import ConfigError
from model.hugging_face.folder import ExportDescription
from model.memory.sizes import MemorySizes
from model.structure.head_weights import phases
from pipeline.checkpoint.train_state import TrainState
from pipeline.config.run_config import RunConfig
from pipeline.reporting.final_figures import final_figures
from pipeline.reporting.metrics import Scalars, read_metrics

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- headway
- multi-token-prediction
---

# {name}

A language model that predicts {heads} at once
([Gloeckle et al. 2024](https://arxiv.org/abs/2404.19737)): a trunk of {trunk} layers, and heads of
one layer each on its output. Head k at position t predicts token t+k, all through one unembedding.
Trunk and head 1 are a plain Llama of {llama} layers, which any tool for Llama models reads.
{origin}
## Use

As a plain Llama:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
```

With all heads:

```python
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
input_ids = tokenizer("The", return_tensors="pt").input_ids
logits = model.all_head_logits(input_ids)  # [batch, seq, {n}, {vocabulary}]
```

With the heads as drafts, the same greedy text in fewer forwards; without `num_heads`, `generate` is
that of the plain Llama:

```python
text = model.generate(input_ids, num_heads={n}, max_new_tokens=32, do_sample=False)
```

or, faster, by Headway itself:

```
python -m model.generate folder --prompt "..." --compare
```

Head 1 was tried in vLLM 0.32 as it is, and in llama.cpp by way of Headway's
`examples/to_llama_cpp.py`, since its converter does not know tokenizers trained on other text; its
`docs/guides/other_engines.md` says how they compared, and how the heads draft in vLLM.

To train on, pass `labels`: the loss is that of all heads, for `transformers.Trainer` and adapters.
`save_pretrained` keeps the heads.

```python
loss = model(input_ids, labels=input_ids).loss
```

## Model

{model}

## Tokens and defaults

{tokens}

## Training

{training}

## Figures of the run

{figures}

The logits of every head in this folder were compared with the training checkpoint's before the
folder got its name.
"""


def model_card(
    config: RunConfig,
    state: TrainState,
    description: ExportDescription,
    records: Sequence[Scalars],
    tokens: Sequence[tuple[str, str]],
) -> str:
    """The card as Markdown.

    Args:
        config: the run.
        state: of the exported checkpoint.
        description: what the export is of.
        records: the run's metrics up to the checkpoint; none = the card says that there are none.
        tokens: what it says of special tokens, tokenizer files and defaults.
    """
    model = config.model
    heads = model.future_tokens
    figures = _table(final_figures(records, heads)) if records else "None were kept."
    return _CARD.format(
        name=config.run.name,
        heads="the next token" if heads == 1 else f"the next {heads} tokens",
        trunk=model.trunk_layers,
        llama=model.trunk_layers + 1,
        origin=_origin(config),
        n=heads,
        vocabulary=model.vocab_size,
        model=_table(_sizes(description)),
        tokens=_table(tokens),
        training=_table(_training(config, state)),
        figures=figures,
    )


def metrics_until(run_dir: Path, step: int) -> list[Scalars]:
    """The metrics of a run up to a step; empty where there are none to be read."""
    try:
        records = read_metrics(run_dir)
    except ConfigError:
        return []
    return [record for record in records if (record["step"] or 0) <= step]


def _origin(config: RunConfig) -> str:
    source = config.train.init_from
    if source is None:
        return ""
    if config.train.freeze == "early_exit":
        return (
            f"\nIt is the first {config.model.trunk_layers} layers, the embedding and the LM head "
            f"of the model in `{source.name}`, as they were, and an early-exit adapter on them: "
            "head 1 here, which drafts for that model "
            "([Liu et al. 2024](https://arxiv.org/abs/2404.18911)):\n\n"
            "```\npython -m model.generate MODEL --early-exit folder --compare\n```\n"
        )
    frozen = config.train.freeze == "trunk"
    what = "They were left as they were" if frozen else "Its training went on from there"
    return f"\nTrunk and head 1 began as the model in `{source.name}`. {what}.\n"


def _sizes(description: ExportDescription) -> list[tuple[str, str]]:
    model = description.model
    scaling = model.rope_scaling
    return [
        ("Parameters", f"{model.num_parameters():,}"),
        ("Heads", str(model.future_tokens)),
        ("Layers", f"{model.trunk_layers} in the trunk, 1 in each head"),
        ("Hidden size", f"{model.hidden_size}, feed-forward {model.ffn_hidden_size}"),
        ("Attention heads", f"{model.attention_heads}, key-value heads {model.kv_heads}"),
        ("Vocabulary", f"{model.vocab_size:,}, end of text {description.eos_token!r}"),
        (
            "Rotary base",
            f"{model.rope_theta:g}" + (f", {scaling.rope_type} scaling" if scaling else ""),
        ),
        ("Weights", description.dtype),
        *([] if model.memory is None else [("Memory", _memory(model.memory))]),
    ]


def _memory(sizes: MemorySizes) -> str:
    return (
        f"segments of {sizes.segment} tokens, {sizes.cache} memories, mode {sizes.mode}; "
        "run by `python -m model.generate`, and by no class of transformers"
    )


def _training(config: RunConfig, state: TrainState) -> list[tuple[str, str]]:
    options, schedule = config.optimizer, config.schedule
    samples = config.global_batch_size(state.layout.data)
    rows = [
        ("Steps", f"{state.step:,} of {config.steps:,}"),
        ("Tokens", f"{state.tokens:,}"),
        ("Batch", f"{samples:,} samples of {state.sequence_length:,} tokens"),
        (
            "Optimizer",
            f"AdamW, peak learning rate {options.learning_rate:g}, betas {options.betas}, weight "
            f"decay {options.weight_decay:g}, clipping {options.gradient_clipping:g}",
        ),
        ("Schedule", f"{schedule.kind}, warm-up over {schedule.warmup_steps:,} steps"),
        ("Arithmetic", state.layout.precision),
        ("Head weights", _head_weights(config.model)),
        ("Data", f"fingerprint `{state.data_fingerprint[:16]}`, seed {state.data_seed}"),
    ]
    if config.train.freeze == "trunk":
        rows.append(("Trained", f"heads 2 to {config.model.future_tokens} only"))
    if config.train.freeze == "early_exit":
        rows.append(("Trained", "the adapter, head 1, only"))
    return rows


def _head_weights(model: ModelConfig) -> str:
    """Example: `1, 1`; `1, 0; after 500 steps: 1, 1`."""
    told = []
    for phase in phases(model.head_weights, model.future_tokens):
        when = f"after {phase.step:,} steps: " if phase.step else ""
        told.append(when + ", ".join(f"{weight:g}" for weight in phase.weights))
    return "; ".join(told)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = [[text.replace("|", "\\|") for text in row] for row in rows]  # as in <|endoftext|>
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
