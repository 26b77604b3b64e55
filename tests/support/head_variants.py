"""The kinds of heads that the tests of every part of the project go through."""

from typing import Any

# By a short name: keys of the model section, beside the number of heads and of layers.
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "causal": {"head_kind": "causal"},
    "anticausal": {"head_kind": "anticausal"},
    "linear": {"head_kind": "linear"},
    "two layers": {"head_layers": 2},
    "replicated": {"lm_head": "replicated"},
    "causal, two layers, replicated": {
        "head_kind": "causal",
        "head_layers": 2,
        "lm_head": "replicated",
    },
    "anticausal, two layers": {"head_kind": "anticausal", "head_layers": 2},
    "linear, replicated": {"head_kind": "linear", "lm_head": "replicated"},
}
