"""Study: does a second head teach a small model to look names up?

`python -m benchmarks.studies.induction [--quick]` trains models of several sizes with one and with
two heads on stories, and asks for the second token of names that they never saw, given the first.
"""

import json
import random
import sys
from pathlib import Path

import tokenizers
import torch

from benchmarks.studies.induction.stories import USUAL_NAMES, Story, tell, two_token_names
from benchmarks.studies.runner import Figures, Study, Trained, main, shard
from model.hugging_face.loading import load_export
from model.language_model import MultiTokenModel

_STORIES, _QUICK_STORIES = 60_000, 1_000
_ASKED = 100
_VOCABULARY = 512
# Of the stories learnt from, so many have names of their own, so that names must be looked up.
_RARE_NAMES = 0.5


def prepare(folder: Path, quick: bool) -> dict[str, Path]:
    """Shards of stories, half of them about usual names, half about made-up ones."""
    path = folder / "stories.jsonl"
    if not (folder / "shards" / "manifest.json").exists():
        generator = random.Random(5)
        with path.open("w") as file:
            for _ in range(_QUICK_STORIES if quick else _STORIES):
                names: tuple[str, ...] = USUAL_NAMES
                if generator.random() < _RARE_NAMES:
                    names = tuple(_made_up(generator) for _ in range(2))
                file.write(json.dumps({"text": tell(generator, names).text}) + "\n")
    return {
        "stories": shard(
            folder / "shards", "--input", str(path), "--tokenizer", f"train:{_VOCABULARY}"
        )
    }


def _made_up(generator: random.Random) -> str:
    """Two or three syllables, for example Tolira."""
    syllables = [
        generator.choice("bdfgklmnprstvz") + generator.choice("aeiou")
        for _ in range(generator.randint(2, 3))
    ]
    return "".join(syllables).capitalize()


def measure(trained: Trained, quick: bool) -> Figures:
    """Share of second tokens of names, after their first mention, that head 1 gets right."""
    loaded = load_export(trained.export, torch.float32)
    names = two_token_names(loaded.tokenizer, 200, seed=17)
    generator = random.Random(23)
    asked = [tell(generator, names) for _ in range(10 if quick else _ASKED)]
    right = total = 0
    for story in asked:
        found = second_tokens(loaded.model, loaded.tokenizer, story)
        right += sum(found)
        total += len(found)
    return {
        "second_token": right / max(total, 1),
        "loss": trained.held_out_loss,
        "parameters": float(loaded.record.description.model.num_parameters()),
    }


@torch.no_grad()
def second_tokens(
    model: MultiTokenModel, tokenizer: tokenizers.Tokenizer, story: Story
) -> list[bool]:
    """For each mention of a name but its first: whether its second token is head 1's likeliest."""
    ids = tokenizer.encode(story.text).ids
    spelled = {tuple(tokenizer.encode(" " + name).ids) for name in story.names}
    trunk_output = model(torch.tensor([ids]))
    logits = model.all_logits(trunk_output, model.context(len(ids), torch.device("cpu")))[0, :, 0]
    likeliest = logits.argmax(-1).tolist()
    seen: set[tuple[int, ...]] = set()
    found = []
    for place in range(len(ids) - 1):
        pair = (ids[place], ids[place + 1])
        if pair in spelled:
            if pair in seen:
                found.append(likeliest[place] == pair[1])
            seen.add(pair)
    return found


STUDY = Study(
    folder=Path(__file__).parent,
    title="Induction on names of two tokens",
    prepare=prepare,
    measure=measure,
    columns={
        "second_token": "second tokens of names that are right",
        "loss": "held-out loss, head 1",
        "parameters": "parameters",
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
