"""What an export says beside its weights: an imported model's own, or what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from foundation.command_line import EXIT_USER_ERROR
from model.errors import ConfigError
from model.generate import main as generate_main
from model.hugging_face.identity import ImportedIdentity, TokenizerOrigin, read_identity
from model.hugging_face.importing import LlamaFolder
from pipeline.exporting.identity import Identity, kept_identity, own_identity
from pipeline.exporting.writing import write_export
from tests.support.original_models import EOS, ORIGINALS, PAD, SPECIAL, said_by, tokenizer
from tests.support.tiny_export import byte_tokenizer, describe
from tests.support.tiny_llama import VOCABULARY, fitting_config, imported_model, save_llama
from tests.support.tiny_model import tiny_config, tiny_weights


def imported(folder: Path, origin: TokenizerOrigin = "same") -> ImportedIdentity:
    """What a run keeps of a folder, as its checkpoint has it."""
    found = read_identity(folder, vocab_size=VOCABULARY, tokenizer=origin)
    return ImportedIdentity.model_validate_json(found.model_dump_json())


def export_again(
    folder: Path, target: Path, *, trained_on: int = 64, origin: TokenizerOrigin = "same"
) -> Identity:
    """Import a folder and export it, without a step; gives what the export says."""
    kept = imported(folder, origin)
    config = fitting_config(folder, 2)
    description = describe(
        config,
        sequence_length=max(trained_on, kept.positions),
        eos_token="</s>",
        eos_id=EOS,
    )
    content = (folder / "tokenizer.json").read_bytes()
    identity = kept_identity(description, content, kept)
    weights = imported_model(folder, config).named_parameters()
    write_export(target, description, weights, tokenizer=content, identity=identity)
    return identity


@pytest.mark.parametrize("make", ORIGINALS.values(), ids=ORIGINALS)
def test_an_imported_model_comes_out_as_itself(make: Any, tmp_path: Path) -> None:
    """Config, special tokens, chat template and what generate() does are the original's, twice."""
    make(tmp_path / "original")
    export_again(tmp_path / "original", tmp_path / "export")
    original = said_by(tmp_path / "original")
    assert said_by(tmp_path / "export") == original
    export_again(tmp_path / "export", tmp_path / "second")
    assert said_by(tmp_path / "second") == original


def test_defaults_of_generation_load_by_themselves(tmp_path: Path) -> None:
    """generation_config.json is the original's to the byte, and absent where it was."""
    for name in ("chat", "silent"):
        ORIGINALS[name](tmp_path / name)
        export_again(tmp_path / name, tmp_path / f"{name}-export")
    before = GenerationConfig.from_pretrained(tmp_path / "chat").to_dict()
    assert GenerationConfig.from_pretrained(tmp_path / "chat-export").to_dict() == before
    content = (tmp_path / "chat" / "generation_config.json").read_bytes()
    assert (tmp_path / "chat-export" / "generation_config.json").read_bytes() == content
    assert not (tmp_path / "silent-export" / "generation_config.json").exists()


def test_longer_training_raises_the_limits_and_the_card_says_so(tmp_path: Path) -> None:
    """Positions are the more of those it had and those it was trained on."""
    ORIGINALS["base"](tmp_path / "original")
    path = tmp_path / "original" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 128}))
    identity = export_again(tmp_path / "original", tmp_path / "export", trained_on=500)
    said = said_by(tmp_path / "export")
    assert said["config"]["max_position_embeddings"] == said["longest"] == 500
    card = dict(identity.card)
    assert card["Positions"] == "500, as many as it was trained on"
    assert card["Changed in `tokenizer_config.json`"] == "`model_max_length`"


def test_the_card_says_what_was_not_kept(tmp_path: Path) -> None:
    """Code, folders and ids of no token are left out, the rest of the folder is kept."""
    ORIGINALS["chat"](tmp_path / "original")
    folder = tmp_path / "original"
    path = folder / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 99_999}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "additional_chat_templates").mkdir()
    (folder / "merges.txt").write_text("#version: 0.2\n")
    identity = export_again(folder, tmp_path / "export", origin="larger")
    card = dict(identity.card)
    assert card["Not kept: `pad_token_id`"] == "not a token of a vocabulary of 260"
    assert card["Not kept: `additional_chat_templates`"] == "an export has no folders"
    assert "of the shards" in card["Not kept: `merges.txt`"]
    assert card["Changed in `tokenizer_config.json`"] == "`auto_map`, `tokenizer_class`"
    assert "`chat_template.jinja`" in card["Kept files"]
    assert "with all tokens of the model" in card["`tokenizer.json`"]
    assert not (tmp_path / "export" / "merges.txt").exists()
    assert "[user]hi" in said_by(tmp_path / "export")["chat"]


def test_the_card_names_an_end_at_which_generate_does_not_stop(tmp_path: Path) -> None:
    """Documents may end with another token than the model's texts did."""
    ORIGINALS["silent"](tmp_path / "original")
    card = dict(export_again(tmp_path / "original", tmp_path / "export").card)
    end = "'</s>', id 257, at which `generate` does not stop"
    assert card["Documents ended with"] == end
    ORIGINALS["base"](tmp_path / "base")
    assert "Documents ended with" not in dict(export_again(tmp_path / "base", tmp_path / "b").card)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, "model_type is"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ],
)
def test_other_models_stay_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Whatever their tokenizer files say."""
    ORIGINALS["chat"](tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=words):
        LlamaFolder(tmp_path / "original")


def _from_nothing(target: Path, content: bytes, **options: Any) -> Identity:
    """Export a model that was trained from nothing on shards of this tokenizer."""
    config = tiny_config(vocab_size=VOCABULARY)
    end = options.pop("end", ("</s>", EOS))
    description = describe(config, eos_token=end[0], eos_id=end[1])
    identity = own_identity(description, content, **options)
    weights = tiny_weights(config).items()
    write_export(target, description, weights, tokenizer=content, identity=identity)
    return identity


def test_a_tokenizers_own_padding_is_taken(tmp_path: Path) -> None:
    """A special token for padding pads; no text becomes it, nor gets a token that shards lack."""
    identity = _from_nothing(tmp_path / "export", tokenizer().to_str().encode())
    said = said_by(tmp_path / "export")
    assert said["ids"] == (EOS, EOS, PAD)
    assert said["config"]["pad_token_id"] == said["generation"]["pad_token_id"] == PAD
    assert said["inputs"] == ["input_ids", "attention_mask"]
    assert said["encoded"]["input_ids"][0] == ord("a") - ord("!")  # no <s> before it
    assert dict(identity.card)["Padding"] == "'<pad>', id 258"
    assert "adds no token to a text" in dict(identity.card)["Tokenizer"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "export")(["a", "bcd"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][1:] == [PAD, PAD]


def test_without_one_the_end_of_text_pads(tmp_path: Path) -> None:
    """Not so in config.json, where it would take the end of text out of a later training."""
    content = tokenizer(adds_bos=False, special=("<s>", "</s>")).to_str().encode()
    identity = _from_nothing(tmp_path / "export", content)
    assert identity.files["tokenizer.json"] == content
    said = said_by(tmp_path / "export")
    assert said["ids"] == (EOS, EOS, EOS)
    assert said["generation"]["pad_token_id"] == EOS
    assert said["config"]["pad_token_id"] is None
    assert "Tokenizer" not in dict(identity.card)


def test_documents_that_were_kept_apart_give_no_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing followed an end of text: no token begins one, and a prompt is asked for."""
    content = tokenizer().to_str().encode()
    identity = _from_nothing(tmp_path / "export", content, crosses_documents=False)
    said = said_by(tmp_path / "export")
    assert said["ids"] == (None, EOS, PAD)
    assert said["config"]["bos_token_id"] is said["generation"]["bos_token_id"] is None
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "export" / name).read_text())["bos_token_id"] is None
    assert said["encoded"]["input_ids"][0] == ord("a") - ord("!")
    assert dict(identity.card)["Beginning of text"].startswith("none: with `data.document_mask`")
    folder = str(tmp_path / "export")
    few = ["--max-new-tokens", "2"]
    capsys.readouterr()
    assert generate_main([folder, "--prompt", "a", "--prompt", "", *few]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert "error: prompt 2 is empty, and this model was not trained to begin a" in captured.err
    assert captured.err.count("\n") == 1
    assert generate_main([folder, "--prompt", "a", *few]) == 0


def test_an_empty_prompt_begins_with_the_models_own_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An imported `<s>`, not the end of text, begins a text."""
    ORIGINALS["base"](tmp_path / "original")
    export_again(tmp_path / "original", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    expected = model.generate(torch.tensor([[256]]), max_new_tokens=5)[0, 1:].tolist()
    few = ["--max-new-tokens", "5", "--ids"]
    assert generate_main([str(tmp_path / "export"), "--prompt", "", *few]) == 0
    assert "ids: " + " ".join(map(str, expected)) in capsys.readouterr().out


def test_a_folder_without_a_tokenizer_gets_that_of_the_shards(tmp_path: Path) -> None:
    """Its ids are kept; tokenizer files that may be of another vocabulary are not."""
    save_llama(tmp_path / "original", bos_token_id=7, eos_token_id=[8, 9], pad_token_id=None)
    (tmp_path / "original" / "tokenizer_config.json").write_text('{"bos_token": "<what>"}')
    kept = imported(tmp_path / "original", "unknown")
    identity = kept_identity(
        describe(fitting_config(tmp_path / "original", 2)), byte_tokenizer(), kept
    )
    assert identity.config["eos_token_id"] == [8, 9]
    settings = json.loads(identity.files["tokenizer_config.json"])
    assert "bos_token" not in settings
    assert settings["eos_token"] == settings["pad_token"] == "<|endoftext|>"
    assert (
        "no tokenizer.json to compare" in dict(identity.card)["Not kept: `tokenizer_config.json`"]
    )


def test_no_special_token_is_left_out_of_these_tests() -> None:
    """The numbers above are those of the tokenizer."""
    assert [tokenizer().token_to_id(name) for name in SPECIAL] == [256, 257, 258, 259]
