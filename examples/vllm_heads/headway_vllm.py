"""The heads of an export in vLLM; `generate.py` beside this file uses it.

The model runs heads 2 .. n beside head 1, each with keys and values of its own; vLLM's proposer of
its own class hands on what they said at the last token that was kept, and vLLM verifies it.
"""

from typing import Any

import torch
from safetensors import safe_open
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

FUSED: dict[str, tuple[str, str | int]] = {
    **{f"{part}_proj": ("qkv_proj", part) for part in "qkv"},
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
# Of the newest forward: where each text begins in it, all positions, and at each the drafts.
newest: dict[str, torch.Tensor] = {}


class LlamaWithHeads(LlamaForCausalLM):
    """A Llama whose last layer is head 1, and heads 2 .. n on what that layer reads."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for key in ("head_kind", "head_layers", "lm_head"):  # written where they are not the usual
            if hasattr(self.config, key):
                raise ValueError(f"{key}={getattr(self.config, key)} is not drafted with here")
        layers, self.folder = self.config.num_hidden_layers, vllm_config.model_config.model
        self.model.aux_hidden_state_layers = (layers - 1,)
        self.heads = torch.nn.ModuleDict()
        for head in range(2, self.config.future_tokens + 1):
            name = f"model.layers.{layers + head - 2}"  # no two layers have one number
            self.heads[str(head)] = LlamaDecoderLayer(vllm_config=vllm_config, prefix=name)

    def forward(self, input_ids: Any, positions: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """Head 1's output; what the others say is noted."""
        hidden, [trunk] = super().forward(input_ids, positions, *rest, **named)
        outputs = [head(positions, trunk, None) for head in self.heads.values()]
        drafts = [self.compute_logits(self.model.norm(*o)[0]).argmax(-1) for o in outputs]
        if metadata := get_forward_context().attn_metadata:  # None while memory is measured
            starts = next(iter(metadata.values())).query_start_loc
            newest.update(starts=starts, positions=positions, drafts=torch.stack(drafts, dim=1))
        return hidden

    def load_weights(self, weights: Any) -> set[str]:
        """Those of the plain Llama, and the extra heads' from the file beside it."""
        loaded: set[str] = super().load_weights(weights)
        with safe_open(f"{self.folder}/extra_heads.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = name.split(".")[-2]
                whole, shard = FUSED.get(part, (part, None))
                ours = name.replace("extra_heads", "heads").replace(part, whole)
                parameter = self.get_parameter(ours)
                load = getattr(parameter, "weight_loader", lambda p, t: p.data.copy_(t))
                load(parameter, file.get_tensor(name), *([] if shard is None else [shard]))
                loaded.add(ours)
        return loaded


class HeadProposer:
    """Hands on the drafts of each text's last token; of the process that runs the model."""

    def __init__(self, vllm_config: Any) -> None:
        self.count = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, *args: Any) -> None:
        """There is nothing to load."""

    def propose(self, sampled: Any, num_tokens: Any, *rest: Any, **named: Any) -> list[list[int]]:
        """Drafts for each text; none where its prompt is still being read."""
        found: list[list[int]] = []
        for row, new in enumerate(sampled):
            start = int(newest["starts"][row])
            # The position before the newest token: head 1 said that token there.
            at = start + int(num_tokens[row]) - 2 - int(newest["positions"][start])
            found.append(newest["drafts"][at, : self.count].tolist() if new else [])
        return found
