"""Every kind of head, exported: read back, decoded, run by transformers, and begun with again."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from model.config import ModelConfig
from model.decoding.chain import ChainDecoder
from model.decoding.draft_model import DraftModelDecoder
from model.decoding.generation import stream
from model.decoding.tree import TreeDecoder
from model.errors import CheckpointError, ConfigError
from model.hugging_face.importing import ImportedWeights, LlamaFolder
from model.hugging_face.loading import load_export
from model.hugging_face.modeling_headway import HeadwayForCausalLM, HeadwayLinearForCausalLM
from model.hugging_face.saved_folder import read_any_record
from model.inference.loading import load_drafter, load_network
from model.inference.prefill import prefill
from model.structure.parameter_shapes import parameter_shapes
from model.structure.sharding import placement_of, take_slice
from pipeline.checkpoint.sharded_tensors import Snapshot, StateFiles, run_key
from pipeline.exporting.acceptance import head_predictions
from pipeline.exporting.layer_by_layer import compare_layers
from pipeline.exporting.whole_model import compare
from tests.support.head_variants import VARIANTS
from tests.support.tiny_export import VOCABULARY, describe, export_tiny
from tests.support.tiny_model import (
    greedy_continuation,
    head_logits,
    tiny_config,
    tiny_model,
    tiny_prompts,
    tiny_weights,
)

HEADS, LAYERS = 3, 8
TOKENS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
NEW_TOKENS = 16
ROUNDING = 5e-5  # of logits up to 10; transformers computes rotations in fp32

# Combinations are in `make stress`.
every_variant = pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.stress) if "," in v else v for v in VARIANTS],
)


def config_of(variant: str, **changes: Any) -> ModelConfig:
    """Of the export of a variant."""
    sizes = {"vocab_size": VOCABULARY, "layers": LAYERS, "future_tokens": HEADS}
    return tiny_config(**sizes | VARIANTS[variant] | changes)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny export of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    found = {}
    for variant, keys in VARIANTS.items():
        found[variant] = folder / variant
        export_tiny(found[variant], layers=LAYERS, future_tokens=HEADS, **keys)
    return found


def load(folder: Path) -> Any:
    """Through transformers' own class for remote code."""
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64
    ).eval()


@every_variant
def test_it_is_read_back(variant: str, exports: dict[str, Path]) -> None:
    """Logits of all heads are those of the weights it was made from."""
    config = config_of(variant)
    expected = head_logits(tiny_model(config), TOKENS)
    loaded = load_export(exports[variant], torch.float64)
    assert loaded.record.description.model == config
    assert torch.equal(head_logits(loaded.model, TOKENS), expected)


@every_variant
def test_both_checks_of_an_export_hold(
    variant: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    """Whole models and layer by layer; both see a head whose weights were changed."""
    config, folder = config_of(variant), exports[variant]
    weights = tiny_weights(config)
    assert compare(folder, describe(config), iter(weights.items())).holds

    def layer_by_layer(name: str) -> bool:
        for rank in range(2):
            runs = {
                run_key("weight", name, 0): take_slice(w, placement_of(name), rank, 2).flatten()
                for name, w in weights.items()
                if rank == 0 or placement_of(name).dim is not None
            }
            Snapshot(rank, rank, 2, 1, runs).write(tmp_path / name)
        return compare_layers(folder, describe(config), StateFiles(tmp_path / name, config)).holds

    assert layer_by_layer("same")
    changed = next(name for name in weights if name.startswith("heads.layers.2."))
    weights[changed] = weights[changed] + 0.1
    assert not layer_by_layer("other")
    assert not compare(folder, describe(config), iter(weights.items())).holds


@every_variant
def test_transformers_has_all_heads(variant: str, exports: dict[str, Path]) -> None:
    """By the class that the folder brings; head 1 as `forward` has it."""
    expected = head_logits(tiny_model(config_of(variant)), TOKENS)
    model = load(exports[variant])
    with torch.no_grad():
        found = model.all_head_logits(TOKENS).permute(2, 0, 1, 3)
        plain = model(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(plain, expected[0], rtol=0, atol=ROUNDING)


@every_variant
def test_a_plain_llama_is_one_only_where_it_may(variant: str, exports: dict[str, Path]) -> None:
    """Of linear heads the folder says that it is none; of all others it is head 1."""
    folder = exports[variant]
    written = json.loads((folder / "config.json").read_text())
    if "linear" in variant:
        assert written["model_type"] == "headway"
        assert written["architectures"] == ["HeadwayLinearForCausalLM"]
        with pytest.raises(ValueError, match="custom code"):
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    expected = head_logits(tiny_model(config_of(variant)), TOKENS)[0]
    llama, info = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys"))
    with torch.no_grad():
        torch.testing.assert_close(llama(TOKENS).logits, expected, rtol=0, atol=ROUNDING)


@every_variant
def test_decoding_computes_the_same(variant: str, exports: dict[str, Path]) -> None:
    """Prompts in pieces, then new positions with a cache; and predictions at all positions."""
    config = config_of(variant)
    expected = head_logits(tiny_model(config), TOKENS)
    network = load_network(exports[variant], torch.float64).network
    lengths = torch.tensor([7, 4])
    for heads in (1, 2, HEADS):
        cache = network.new_cache(2, 40)
        first = prefill(network, cache, TOKENS[:, :7], lengths, heads, piece=3)
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(
                first[:heads, row], expected[:heads, row, length - 1], rtol=0, atol=1e-9
            )
        rows = torch.stack([TOKENS[0, 7:10], TOKENS[1, 4:7]])
        block = network.following(cache, 3, 64)
        states = network.fill_heads(network.trunk(rows, cache, block), heads, cache, block)
        later = network.head_logits(network.heads(states, 1, heads, cache, block), 1)
        wanted = torch.cat([expected[:heads, 0, 7:10], expected[:heads, 1, 4:7]], dim=1)
        torch.testing.assert_close(later, wanted, rtol=0, atol=1e-9)
    assert torch.equal(head_predictions(network, TOKENS)[0], expected.argmax(-1).transpose(1, 2))


@every_variant
def test_drafts_of_its_heads_change_no_token(variant: str, exports: dict[str, Path]) -> None:
    """Greedy decoding with chains and trees of any number of heads is that of head 1 alone."""
    model = tiny_model(config_of(variant))
    network = load_network(exports[variant], torch.float64).network
    prompts = tiny_prompts(VOCABULARY)
    expected = [greedy_continuation(model, prompt, NEW_TOKENS) for prompt in prompts]
    decoders: list[Any] = [ChainDecoder(network, heads=k) for k in range(1, HEADS + 1)]
    decoders.append(TreeDecoder(network, heads=HEADS, spread=2))
    for decoder in decoders:
        found: list[list[int]] = [[] for _ in prompts]
        for piece in stream(decoder, prompts, max_new_tokens=NEW_TOKENS):
            found[piece.row] += piece.tokens
        assert found == expected


@every_variant
def test_it_drafts_for_another(variant: str, exports: dict[str, Path]) -> None:
    """Its next-token model alone; for itself, so that every draft is right."""
    loaded = load_network(exports[variant], torch.float64)
    drafter = load_drafter(exports[variant], loaded)
    prompts = tiny_prompts(VOCABULARY)
    model = tiny_model(config_of(variant))
    found: list[list[int]] = [[] for _ in prompts]
    decoder = DraftModelDecoder(loaded.network, drafter=drafter, drafts=3)
    pieces = list(stream(decoder, prompts, max_new_tokens=NEW_TOKENS))
    for piece in pieces:
        found[piece.row] += piece.tokens
    assert found == [greedy_continuation(model, prompt, NEW_TOKENS) for prompt in prompts]
    assert max(piece.forward for piece in pieces) == 1 + -(-(NEW_TOKENS - 1) // 4)


@every_variant
def test_transformers_drafts_with_its_heads(variant: str, exports: dict[str, Path]) -> None:
    """`generate(num_heads=K)` gives the tokens of `generate()`, which are head 1's."""
    model, prompt = load(exports[variant]), TOKENS[:1, :5]
    expected = greedy_continuation(tiny_model(config_of(variant)), prompt[0].tolist(), NEW_TOKENS)
    for heads in range(1, HEADS + 1):
        found = model.generate(
            prompt, num_heads=heads, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        assert found[0, 5:].tolist() == expected


@every_variant
def test_finetuning_reaches_every_head(variant: str, exports: dict[str, Path]) -> None:
    """The loss over labels is that of all heads, and gives every parameter a gradient."""
    model = load(exports[variant])
    output = model(TOKENS, labels=TOKENS)
    expected = head_logits(tiny_model(config_of(variant)), TOKENS)
    for head, loss in enumerate(output.head_losses, 1):
        logits = expected[head - 1, :, :-head].flatten(0, 1)
        wanted = torch.nn.functional.cross_entropy(logits, TOKENS[:, head:].flatten())
        assert float(loss) == pytest.approx(float(wanted), abs=ROUNDING)
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@every_variant
def test_saved_by_transformers_it_has_its_heads(
    variant: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    """And is read by ours and by theirs."""
    load(exports[variant]).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_bytes((exports[variant] / name).read_bytes())
    record = read_any_record(tmp_path / "saved")
    keys = ("layers", "future_tokens", "head_kind", "head_layers", "lm_head")
    wanted = config_of(variant)
    assert [getattr(record.description.model, key) for key in keys] == [
        getattr(wanted, key) for key in keys
    ]
    kind = HeadwayLinearForCausalLM if "linear" in variant else HeadwayForCausalLM
    again = kind.from_pretrained(tmp_path / "saved", dtype=torch.float64).eval()
    with torch.no_grad():
        found = again.all_head_logits(TOKENS).permute(2, 0, 1, 3)
    expected = head_logits(tiny_model(wanted), TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    loaded = load_export(tmp_path / "saved", torch.float64)
    torch.testing.assert_close(head_logits(loaded.model, TOKENS), expected, rtol=0, atol=ROUNDING)


def begun_with(folder: Path, config: ModelConfig, **options: Any) -> dict[str, torch.Tensor]:
    """The weights of a run that begins with a folder; what is fresh is zeros."""
    found = LlamaFolder(folder)
    found.check(config)
    imported = ImportedWeights(found, config, **options)
    shapes = parameter_shapes(config)
    return {
        name: imported(name, functools.partial(torch.zeros, shape))
        for name, shape in shapes.items()
    }


@every_variant
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_a_run_begins_with_it_and_other_heads(
    variant: str, exports: dict[str, Path], heads: int
) -> None:
    """Fewer, as many and more heads: what the next token is said from is the same model."""
    stored, each = config_of(variant), config_of(variant).layers_per_head
    layers = LAYERS + (heads - HEADS) * each
    if stored.head_kind == "anticausal":
        layers = LAYERS
        if each == 2 and heads == 4:
            with pytest.raises(ValidationError, match="must be smaller"):
                config_of(variant, layers=layers, future_tokens=heads)
            return
    config = config_of(variant, layers=layers, future_tokens=heads)
    weights = begun_with(exports[variant], config)
    found = head_logits(tiny_model(config, weights), TOKENS)
    expected = head_logits(tiny_model(stored), TOKENS)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    if stored.head_kind != "anticausal":
        same = min(heads, HEADS)
        torch.testing.assert_close(found[:same], expected[:same], rtol=0, atol=1e-9)


@every_variant
def test_any_kind_begins_with_a_plain_llama(
    variant: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    """Its next-token model is the Llama."""
    plain = AutoModelForCausalLM.from_pretrained(exports["anticausal"], dtype=torch.float64)
    plain.config.__dict__.pop("future_tokens")
    plain.config.__dict__.pop("head_kind")
    plain.save_pretrained(tmp_path / "llama")
    keys = VARIANTS[variant]
    each = 0 if "linear" in variant else keys.get("head_layers", 1)
    passed = HEADS if keys.get("head_kind") == "anticausal" else 1
    config = config_of(variant, layers=LAYERS + (HEADS - passed) * each)
    weights = begun_with(tmp_path / "llama", config, new_heads="copy")
    found = head_logits(tiny_model(config, weights), TOKENS)[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS).logits, found, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("key", "value"),
    [("head_kind", "serial"), ("head_kind", []), ("head_layers", 0), ("head_layers", True),
     ("head_layers", 99), ("lm_head", None)],
)  # fmt: skip
def test_changed_keys_of_a_folder_are_one_error(
    exports: dict[str, Path], tmp_path: Path, key: str, value: object
) -> None:
    """Wherever a folder is read that may be another's."""
    folder = Path(shutil.copytree(exports["causal"], tmp_path / "changed"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (folder / "headway.json").unlink()
    (folder / "all_heads.safetensors.index.json").unlink()
    loaded = load_network(exports["causal"])
    for read in (lambda: load_drafter(folder, loaded), lambda: read_any_record(folder)):
        with pytest.raises((ConfigError, CheckpointError)) as error:
            read()
        assert len(str(error.value).splitlines()) == 1
    if key == "head_kind":
        with pytest.raises(ValueError, match="head_kind"):
            load(folder)


def test_heads_of_one_kind_do_not_begin_another(exports: dict[str, Path]) -> None:
    """They would compute something else; the error says which key to set."""
    config = config_of("parallel", head_kind="causal")
    with pytest.raises(ConfigError, match=r"model\.head_kind=causal must be parallel"):
        LlamaFolder(exports["parallel"]).check(config)
