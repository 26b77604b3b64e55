"""One GGUF file from an export: `python examples/to_llama_cpp.py LLAMA_CPP [EXPORT] [FILE]`.

The converter of a llama.cpp checkout does the work. It recognises published tokenizers by what they
make of a sentence, so one of `train:V` or `bytes` stops it; which of llama.cpp's ways to split text
is the same is said here instead, by the tokenizer's own pattern. Head 1 is what the file has.
"""

import argparse
import importlib
import json
import runpy
import sys
from pathlib import Path

# llama.cpp's names of patterns. "dbrx" is Llama 3's, which `train:V` has, and takes no whole word
# past the merges; "gpt-2" stands for none, since without merges nothing is joined, however split.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NO_MERGE = "\N{SNOWMAN} \N{SNOWMAN}"  # of a character that spells no byte; a list must not be empty


def pre_tokenizer(tokenizer: dict) -> str | None:  # type: ignore[type-arg]
    """llama.cpp's name of how a parsed tokenizer.json splits text; None = its converter knows."""
    if not tokenizer["model"].get("merges"):
        return "gpt-2"
    steps = tokenizer["pre_tokenizer"].get("pretokenizers", [])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    return "dbrx" if patterns == [LLAMA_3] else None


def main() -> None:
    """Name the way to split text and run the converter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path, help="a checkout; its requirements are installed")
    parser.add_argument("export", type=Path, nargs="?", default=Path("runs/examples/export"))
    parser.add_argument("file", type=Path, nargs="?", default=Path("runs/examples/export.gguf"))
    given = parser.parse_args()
    sys.path[:0] = [str(given.llama_cpp / "gguf-py"), str(given.llama_cpp)]
    gguf = importlib.import_module("gguf")
    text_model = importlib.import_module("conversion.base").TextModel

    tokenizer = json.loads((given.export / "tokenizer.json").read_text(encoding="utf-8"))
    name = pre_tokenizer(tokenizer)
    if name is not None:
        text_model.get_vocab_base_pre = lambda self, tokenizer: name
    if not tokenizer["model"].get("merges"):
        load = gguf.SpecialVocab.__init__

        def with_a_merge(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
            load(self, *args, **kwargs)
            self.merges = self.merges or [NO_MERGE]

        gguf.SpecialVocab.__init__ = with_a_merge
    converter = str(given.llama_cpp / "convert_hf_to_gguf.py")
    sys.argv = [converter, str(given.export), "--outfile", str(given.file), "--outtype", "f32"]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main()
