"""The folder in which a page's blocks run: the tree with everything in it made small."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.command_server import CommandServer
from tests.support.page_blocks import ROOT, Block
from tests.support.tiny_llama import LLAMA3, save_llama

VOCABULARY = 4096
STEPS = 4
TIMEOUT_S = 300
_LINKED = (
    "benchmarks",
    "data_prep",
    "docs",
    "examples",
    "foundation",
    "model",
    "pipeline",
    "slurm",
    "tests",
)
_LINKED_FILES = (
    "headway.py",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "setup.py",
    "constraints.txt",
)
_MODEL = {
    "hidden_size": 32,
    "attention_heads": 4,
    "kv_heads": 2,
    "ffn_hidden_size": 48,
    "vocab_size": VOCABULARY,
}
_WORDS = "def return import the of a model token loss while None naïve 数据 print 12 == ( )"


class Sandbox:
    """A page's folder, and the shell that its blocks run in.

    Args:
        folder: where to; does not exist yet.
        server: runs the commands.
    """

    def __init__(self, folder: Path, server: CommandServer) -> None:
        self.folder = folder
        self._server = server
        folder.mkdir()
        for name in (*_LINKED, *_LINKED_FILES):
            if (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        for path in (folder / "configs").glob("*.yaml"):
            path.write_text(yaml.safe_dump(small_config(yaml.safe_load(path.read_text()))))
        write_corpus(folder / "raw")

    def fill(self, made: Path, left_out: Sequence[str]) -> None:
        """Add what was made once for all pages, but for what this page makes itself."""
        for name in ("data/corpus", "runs/1b", "export", "llama"):
            if name not in left_out:
                shutil.copytree(made / name, self.folder / name)

    def run(self, block: Block) -> None:
        """Run a block, or write its file; the block's position is in what fails."""
        if block.kind == "file":
            path = self.folder / block.value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            return
        wanted = int(block.value.removeprefix("exits ") or 0)
        script = block.text
        if block.language == "python":
            (self.folder / ".block.py").write_text(block.text)
            script = "python - < .block.py"
        self.shell(script, wanted, block.where)

    def shell(self, script: str, wanted: int = 0, where: str = "") -> str:
        """Run lines of bash as a reader types them; gives what they printed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self._server.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == wanted, (
            f"{where}: exit status {done.returncode}, not {wanted}\n{script}\n{done.stdout[-3000:]}"
        )
        return done.stdout


def small_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with the same sections and keys, and sizes for a second or two."""
    model = config["model"] | _MODEL
    model["layers"] = model["future_tokens"] + 3
    if "rope_scaling" in model:
        model["rope_scaling"] = dict(LLAMA3)
    if model.get("memory"):
        model["memory"] |= {"segment": 4, "summary": 2, "sensory": 1}
    train = config["train"] | {"steps": STEPS, "device": "auto", "precision": "auto"}
    data = config["data"] | {"sequence_length": 16, "shards": "data/corpus"}
    if data.get("review"):
        del train["steps"]
        data["review"] = data["review"] | {"sequences": 8}
    if "init_from" in train:
        train["init_from"] = "llama"
    schedule = config["schedule"] | {"warmup_steps": 1}
    if "decay_steps" in schedule:
        schedule["decay_steps"] = 1
    return config | {
        "model": model,
        "data": data,
        "batch": {"micro_size": 2, "accumulation": config["batch"].get("accumulation", 1) and 1},
        "parallel": _parallel(config.get("parallel", {})),
        "train": train,
        "schedule": schedule,
        "eval": {"every_steps": 2, "samples": 4},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "log": {"interval": 1, "tensorboard": False},
    }


def _parallel(parallel: dict[str, Any]) -> dict[str, Any]:
    """One tensor-parallel rank and at most ZeRO-1; stages are two, whatever they were."""
    stages = {"stages": "auto:2"} if parallel.get("stages", 1) != 1 else {}
    return {"zero": min(parallel.get("zero", 1), 1), "tensor": 1, **stages}


def write_corpus(folder: Path) -> None:
    """Some hundred documents: lines of JSON, a text, source files."""
    source = random.Random(1)
    texts = [" ".join(source.choices(_WORDS.split(), k=source.randint(20, 60))) for _ in range(200)]
    (folder / "code").mkdir(parents=True)
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(texts)]
    (folder / "web.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "notes.txt").write_text("\n".join(texts[:20]))
    for number in range(20):
        body = "\n    ".join(texts[number].split(" while "))
        content = f"import os\n\n\ndef f{number}():\n    {body}\n"
        (folder / "code" / f"part_{number}.py").write_text(content)


def make_once(sandbox: Sandbox) -> None:
    """What pages begin with: a shard set, a Llama with its tokenizer, a finished run, an export."""
    sandbox.shell(
        "python data_prep/shard.py --input raw --output data/corpus --tokenizer train:512 "
        "--validation-fraction 0.1 --workers 1"
    )
    llama = sandbox.folder / "llama"
    save_llama(
        llama,
        rope={**LLAMA3, "rope_theta": 500000.0},  # that of the configuration for Llama 3.2
        vocab_size=VOCABULARY,
        hidden_size=_MODEL["hidden_size"],
        intermediate_size=_MODEL["ffn_hidden_size"],
        rms_norm_eps=1e-5,
    )
    shutil.copy(sandbox.folder / "data/corpus/tokenizer.json", llama / "tokenizer.json")
    sandbox.shell("python -m pipeline.train configs/1b.yaml")
    sandbox.shell("python -m pipeline.export runs/1b export")


def made_by(blocks: Sequence[Block]) -> list[str]:
    """Which of the things that a sandbox has a page makes itself."""
    text = "\n".join(block.text for block in blocks if block.language == "bash")
    made = []
    if re.search(r"--output data/corpus(?=\s|$)|OUTPUT=data/corpus", text):
        made.append("data/corpus")
    if re.search(r"pipeline\.train configs/1b\.yaml(?!.*run\.(dir|name)=)(?!.*--dry-run)", text):
        made.append("runs/1b")
    if re.search(r"pipeline\.export \S+ export/?(?=\s|$)", text):
        made.append("export")
    return made
