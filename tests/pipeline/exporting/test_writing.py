"""The export folder: a Llama for others, all heads for us, whole or not there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from model.errors import CheckpointError
from model.hugging_face.folder import read_record
from model.hugging_face.loading import load_export
from model.hugging_face.names import hf_names, hf_shapes, join, split
from model.structure.parameter_shapes import parameter_shapes
from pipeline.exporting.writing import write_export, write_record
from tests.support.tiny_export import EOS, VOCABULARY, byte_tokenizer, describe, export_tiny
from tests.support.tiny_model import head_logits, tiny_config, tiny_model, tiny_weights

TOKENS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that no test changes."""
    directory = tmp_path_factory.mktemp("exports") / "whole"
    export_tiny(directory)
    return directory


@pytest.fixture
def copied_export(whole_export: Path, tmp_path: Path) -> Path:
    """An export of the test's own."""
    return Path(shutil.copytree(whole_export, tmp_path / "export"))


def test_queries_keys_and_values_are_told_apart() -> None:
    """Fused rows q0 q1 k0 v0 q2 q3 k1 v1 become queries, keys and values in the order of heads."""
    config = tiny_config()  # 4 queries in 2 groups, 8 rows each
    rows = torch.arange(8).repeat_interleave(8).unsqueeze(1) * torch.ones(32)
    name = "trunk.layers.0.block.self_attention.linear_qkv.weight"
    parts = split(name, rows, config)
    assert [part[::8, 0].tolist() for part in parts] == [[0, 1, 4, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_names_and_layouts_go_there_and_back(kv_heads: int) -> None:
    """Every parameter comes back bit by bit, and no two of them share a tensor's name."""
    config = tiny_config(kv_heads=kv_heads)
    seen: list[str] = []
    for name, tensor in tiny_weights(config).items():
        parts = split(name, tensor, config)
        assert [tuple(part.shape) for part in parts] == hf_shapes(name, tuple(tensor.shape), config)
        assert torch.equal(join(name, parts, config), tensor)
        seen += hf_names(name, config)
    assert len(seen) == len(set(seen))


def test_head_1_is_the_last_layer_of_the_llama() -> None:
    """With 2 trunk layers head 1 is layer 2, and the other heads stand apart."""
    names = [
        hf_names(f"{layer}.block.mlp.linear_fc2.weight", tiny_config())[0]
        for layer in ("trunk.layers.1", "heads.layers.1", "heads.layers.2", "heads.layers.4")
    ]
    assert names == [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "extra_heads.2.mlp.down_proj.weight",
        "extra_heads.4.mlp.down_proj.weight",
    ]


@pytest.mark.parametrize(("future_tokens", "max_file_bytes"), [(4, 10**9), (4, 30_000), (1, 10**9)])
def test_without_extra_heads_it_is_a_plain_llama(
    tmp_path: Path, future_tokens: int, max_file_bytes: int
) -> None:
    """Transformers loads the folder, in one file or many, and gives head 1's logits."""
    weights = export_tiny(
        tmp_path / "export", max_file_bytes=max_file_bytes, future_tokens=future_tokens
    )
    (tmp_path / "export" / "extra_heads.safetensors").unlink(missing_ok=True)
    llama, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert isinstance(llama, LlamaForCausalLM)
    assert llama.config.num_hidden_layers == 6 - future_tokens + 1
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert llama.dtype == torch.float32
    config = tiny_config(vocab_size=VOCABULARY, future_tokens=future_tokens)
    expected = head_logits(tiny_model(config, weights, torch.float32), TOKENS)[0]
    with torch.no_grad():
        logits = llama(TOKENS).logits
    # fp32 with logits up to 20 or so, summed in another order
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


def test_tokenizer_loads_offline_with_its_end_of_text(whole_export: Path) -> None:
    """AutoTokenizer reads the folder, knows the end of text, and adds nothing to a text."""
    tokenizer = AutoTokenizer.from_pretrained(whole_export)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, 256)
    ids = tokenizer("hé")["input_ids"]
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "hé"


@pytest.mark.parametrize("max_file_bytes", [10**9, 30_000])
def test_all_heads_come_back(tmp_path: Path, max_file_bytes: int) -> None:
    """Every parameter loads bit by bit, and the record says what the folder is of."""
    weights = export_tiny(tmp_path / "export", max_file_bytes=max_file_bytes)
    several = list((tmp_path / "export").glob("model-*.safetensors"))
    assert bool(several) == (max_file_bytes < 10**9)
    loaded = load_export(tmp_path / "export")
    parameters = dict(loaded.model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(parameters[name], tensor), name
    assert loaded.record.future_tokens == 4
    assert (loaded.record.description.run, loaded.record.description.step) == ("tiny", 7)


def test_bf16_is_stored_rounded_once(tmp_path: Path) -> None:
    """A bf16 export holds the rounded weights, norms included, and loads as bf16 or as fp32."""
    weights = export_tiny(tmp_path / "export", dtype="bf16")
    for dtype in (None, torch.float32):
        for name, parameter in load_export(tmp_path / "export", dtype).model.named_parameters():
            rounded = weights[name].to(torch.bfloat16)
            assert parameter.dtype == (dtype or torch.bfloat16)
            assert torch.equal(parameter, rounded.to(parameter.dtype))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "extra_heads.safetensors", "tokenizer.json", "config.json"],
)
@pytest.mark.parametrize(
    ("damage", "words"), [(Path.unlink, "is missing"), (_cut, "bytes"), (_flip, "checksum")]
)
def test_a_damaged_file_is_named(
    copied_export: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    """A file that is gone, cut short or changed is refused in one line with its name."""
    damage(copied_export / name)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_export(copied_export)
    assert str(copied_export / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def _rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the extra heads and list the files anew, as a careless tool would."""
    path = directory / "extra_heads.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    description = read_record(directory).description
    (directory / "headway.json").unlink()
    write_record(directory, description)


def test_a_missing_head_is_named(copied_export: Path) -> None:
    """A folder without head 3 is refused, with the head's number and the tensor's name."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("extra_heads.3.")]:
            del tensors[name]

    _rewrite(copied_export, drop)
    with pytest.raises(CheckpointError, match=r"extra_heads\.3\..* of head 3 is missing"):
        load_export(copied_export)


def test_a_tensor_of_wrong_shape_is_named(copied_export: Path) -> None:
    """A tensor of another model is refused with both shapes."""

    def shorten(tensors: dict[str, Tensor]) -> None:
        name = "extra_heads.2.mlp.down_proj.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    _rewrite(copied_export, shorten)
    with pytest.raises(CheckpointError, match=r"down_proj.weight has shape \(32, 47\).*\(32, 48\)"):
        load_export(copied_export)


def test_a_folder_without_record_is_no_export(copied_export: Path, tmp_path: Path) -> None:
    """A plain Llama folder, a damaged record and a missing folder are refused in one line."""
    record = json.loads((copied_export / "headway.json").read_text())
    (copied_export / "headway.json").write_text(json.dumps(record | {"future_tokens": "x"}))
    with pytest.raises(CheckpointError, match=r"headway\.json is damaged \(future_tokens"):
        load_export(copied_export)
    (copied_export / "headway.json").unlink()
    with pytest.raises(CheckpointError, match=r"no readable headway\.json"):
        load_export(copied_export)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_export(tmp_path / "nowhere")


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    """An earlier export or an empty folder is replaced whole; a folder of something else stays."""
    (tmp_path / "export").mkdir()
    export_tiny(tmp_path / "export", future_tokens=4)
    export_tiny(tmp_path / "export", future_tokens=1)
    assert load_export(tmp_path / "export").record.future_tokens == 1
    assert not (tmp_path / "export" / "extra_heads.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="is not an earlier export"):
        export_tiny(tmp_path / "mine")
    assert _content(tmp_path / "mine") == {"thesis.txt": b"precious"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "mine"]


def test_an_export_deletes_nothing_beside_itself(tmp_path: Path) -> None:
    """Folders with names such as export.old are other people's, whatever they hold."""
    for name in ("export.old", "export.partial", ".headway-export-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    for _ in range(2):
        export_tiny(tmp_path / "export")
    for name in ("export.old", "export.partial", ".headway-export-mine"):
        assert _content(tmp_path / name) == {"thesis.txt": b"precious"}
    assert len(list(tmp_path.iterdir())) == 4


def test_an_export_with_other_files_in_it_is_not_replaced(tmp_path: Path) -> None:
    """What somebody added to an export would be lost with it; an edited card is the export's."""
    export_tiny(tmp_path / "export")
    (tmp_path / "export" / "README.md").write_text("edited")
    export_tiny(tmp_path / "export")
    (tmp_path / "export" / "adapter.bin").write_text("precious")
    before = _content(tmp_path / "export")
    with pytest.raises(CheckpointError, match=r"adapter\.bin, which no export wrote"):
        export_tiny(tmp_path / "export")
    assert _content(tmp_path / "export") == before


def test_an_export_goes_through_a_link(tmp_path: Path) -> None:
    """The folder behind the link is replaced and the link stays; a link to nothing is refused."""
    (tmp_path / "scratch").mkdir()
    link = tmp_path / "home" / "export"
    link.parent.mkdir()
    link.symlink_to("../scratch/export")
    with pytest.raises(CheckpointError, match=r"link to \.\./scratch/export, which does not"):
        export_tiny(link)
    (tmp_path / "scratch" / "export").mkdir()
    for future_tokens in (4, 2):
        export_tiny(link, future_tokens=future_tokens)
        assert link.is_symlink()
        assert load_export(tmp_path / "scratch" / "export").record.future_tokens == future_tokens
    assert [path.name for path in link.parent.iterdir()] == ["export"]
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["export"]


def _refuse(_: Path) -> None:
    raise CheckpointError("the check said no")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_refused_export_leaves_things_as_they_were(tmp_path: Path, earlier: bool) -> None:
    """When the check refuses, nothing is left behind and an earlier export is untouched."""
    directory = tmp_path / "export"
    if earlier:
        export_tiny(directory)
    before = _content(directory) if earlier else None
    config = tiny_config(vocab_size=VOCABULARY)
    with pytest.raises(CheckpointError, match="the check said no"):
        write_export(
            directory,
            describe(config),
            tiny_weights(config, seed=1).items(),
            tokenizer=byte_tokenizer(),
            check=_refuse,
        )
    assert [path.name for path in tmp_path.iterdir()] == (["export"] if earlier else [])
    assert not earlier or _content(directory) == before


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A target that cannot be written is a one-line error that names it."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*Not a directory") as caught:
        export_tiny(tmp_path / "file" / "export")
    assert "\n" not in str(caught.value)


def test_files_are_readable_by_all(whole_export: Path) -> None:
    """Every file has the permissions that new files get."""
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in whole_export.iterdir()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w[:-1], "heads.readout.norm_weight is missing"),
        (lambda w: [*w, w[3]], "comes twice"),
        (lambda w: [*w, ("trunk.layers.9.block.x", w[0][1])], "is not one of this model's"),
        (lambda w: [(w[0][0], w[0][1][1:]), *w[1:]], r"has shape \(259, 32\)"),
    ],
)
def test_wrong_weights_are_refused(
    tmp_path: Path,
    change: Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]],
    words: str,
) -> None:
    """A parameter too few, too many, twice or of wrong shape is named, and nothing is written."""
    config = tiny_config(vocab_size=VOCABULARY)
    weights = [(name, torch.zeros(shape)) for name, shape in parameter_shapes(config).items()]
    with pytest.raises(CheckpointError, match=words):
        write_export(
            tmp_path / "export", describe(config), change(weights), tokenizer=byte_tokenizer()
        )
    assert list(tmp_path.iterdir()) == []
