"""The model card: true to the run, to the step that is exported, and complete without metrics."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from model.hugging_face.folder import read_record, verify_files
from pipeline.export import main as export_main
from pipeline.reporting.metrics import read_metrics
from tests.support.tiny_llama import save_llama
from tests.support.training_runs import run_job


def test_it_has_the_figures_of_the_exported_step(config: Path, tmp_path: Path) -> None:
    """Of two checkpoints the earlier one's card has its own last figures, and may be edited."""
    assert run_job(tmp_path, [str(config), "--set", "train.steps=6"]).codes == [0]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert export_main([str(checkpoint), str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    records = read_metrics(tmp_path / "run")
    for head in (1, 2, 3):
        losses = [record[f"loss_head_{head}"] for record in records]
        first, third, last = losses[0], losses[2], losses[-1]
        assert f"| Training loss, head {head} | {third:.4f} (first {first:.4f}) |" in card
        assert f"{last:.4f}" not in card
    for words in (
        "# tiny\n",
        "predicts the next 3 tokens at once",
        "a trunk of 2 layers, and heads of",
        "plain Llama of 3 layers",
        "| Steps | 3 of 6 |",
        f"| Tokens | {3 * 4 * 16} |",
        "| Batch | 4 samples of 16 tokens |",
        "| Vocabulary | 260, end of text '<\\|endoftext\\|>' |",
        "| Padding | '<\\|endoftext\\|>', id 256 |",
        "trust_remote_code=True",
    ):
        assert words in card
    assert "{" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    _run_examples(card, tmp_path)
    (tmp_path / "export" / "README.md").write_text("edited")  # as people do
    verify_files(tmp_path / "export", read_record(tmp_path / "export"))


def _run_examples(card: str, tmp_path: Path) -> None:
    """Its Python as one program, with the folder, as a reader types it."""
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 4
    code = "\n".join(["folder = 'export'", *blocks, "print(logits.shape, text.shape, loss.shape)"])
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shapes = re.findall(r"Size\(\[(.*?)\]\)", done.stdout)
    (_, length, heads, vocabulary), (_, new_length) = (map(int, s.split(", ")) for s in shapes[:2])
    assert (heads, vocabulary, shapes[2]) == (3, 260, "")
    assert length < new_length <= length + 32


def test_it_says_where_the_model_came_from_and_what_is_not_known(
    config: Path, tmp_path: Path
) -> None:
    """An imported, frozen model is named; without metrics the card says that there are none."""
    save_llama(tmp_path / "some-llama")
    sizes = ["model.layers=6", "model.ffn_hidden_size=48", "model.rope_theta=500"]
    sizes += ["model.norm_eps=2e-5", "train.freeze=trunk", "train.steps=1"]
    settings = [f"train.init_from={tmp_path / 'some-llama'}", *sizes]
    assert run_job(tmp_path, [str(config), "--set", *settings]).codes == [0]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    alone = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name))
    assert export_main([str(alone), str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "began as the model in `some-llama`. They were left as they were." in card
    assert str(tmp_path) not in card
    assert "| Trained | heads 2 to 3 only |" in card
    assert "None were kept." in card
