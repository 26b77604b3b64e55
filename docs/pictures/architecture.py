"""Rooms and arrows of the source tree, from its imports: `python -m docs.pictures.architecture`."""

import json
from typing import NamedTuple

from docs.pictures.canvas import BLUE, GRAY, GREEN, ORANGE, PALE_INK, RED, Canvas, target
from docs.pictures.import_graph import Arrow, needed_arrows, room_arrows


class Room(NamedTuple):
    """Where a room is drawn, and what it says.

    Attributes:
        x: center.
        row: line of the grid; arrows go to higher numbers.
        title: name as on disk.
        text: what it does.
    """

    x: float
    row: float
    title: str
    text: str


ROOMS = {
    "pipeline": Room(
        480, 0, "pipeline/", "train job submit plan doctor\nexport inspect report evaluate"
    ),
    "pipeline.evaluating": Room(560, 2.2, "evaluating/", "loss, tokens per\nforward, pass@k"),
    "pipeline.sandbox": Room(500, 6.5, "sandbox/", "programs nobody\nhas read"),
    "pipeline.reporting": Room(710, 1.35, "reporting/", "metrics, logs,\nsummaries"),
    "pipeline.launching": Room(225, 0.95, "launching/", "checks, snapshot,\nthe verdict"),
    "pipeline.planning": Room(370, 2.1, "planning/", "memory, traffic,\ntime of a run"),
    "pipeline.diagnosis": Room(390, 1.2, "diagnosis/", "checks of a\ncluster"),
    "pipeline.exporting": Room(925, 1.0, "exporting/", "a checkpoint to\na Llama folder"),
    "pipeline.data": Room(205, 2.55, "data/", "samples of a run,\nbatch order"),
    "pipeline.review": Room(84, 2.3, "review/", "phases, losses\nof sequences"),
    "pipeline.guard": Room(85, 1.42, "guard/", "bad steps and\nwhat follows"),
    "pipeline.engine": Room(830, 2.75, "engine/", "a step, around\nDeepSpeed"),
    "pipeline.checkpoint": Room(330, 3.6, "checkpoint/", "saved, verified,\nfound, kept"),
    "pipeline.config": Room(330, 4.65, "config/", "one YAML file,\ntyped"),
    "pipeline.stages": Room(330, 5.7, "stages/", "pipeline plan,\n1F1B, transfers"),
    "pipeline.distributed": Room(782, 6.2, "distributed/", "ranks, agreement,\nwatchdog"),
    "data_prep": Room(250, 8, "data_prep/", "shard  verify  inspect\nreport  export_megatron"),
    "data_prep.building": Room(110, 9.1, "building/", "a job, its units,\nthe commit"),
    "data_prep.workers": Room(110, 10.2, "workers/", "processes, MPI,\narray tasks"),
    "data_prep.loading": Room(415, 9.6, "loading/", "order, mixture,\nbatches"),
    "data_prep.shards": Room(250, 10.7, "shards/", "Arrow files,\nmanifest"),
    "data_prep.conversations": Room(345, 12.0, "conversations/", "prompts, chats,\ntargets"),
    "data_prep.inputs": Room(160, 11.6, "inputs/", "files to\nrecords"),
    "data_prep.tokenization": Room(250, 13.0, "tokenization/", "text to\ntokens"),
    "model.generate": Room(615, 7.8, "generate", "text from an export"),
    "model.serve": Room(885, 7.8, "serve", "texts over HTTP"),
    "model.beams": Room(562, 9.0, "beams/", "several texts\nat once"),
    "model.early_exit": Room(645, 9.0, "early_exit/", "drafts of the\nfirst layers"),
    "model.joint_decoding": Room(747, 9.0, "joint_decoding/", "several tokens\nat once"),
    "model.writing": Room(750, 8.16, "writing/", "options, prompts,\ntimed runs"),
    "model.streaming": Room(845, 9.0, "streaming/", "with a\nmemory"),
    "model.serving": Room(942, 9.0, "serving/", "queue, batches,\nOpenAI's API"),
    "model.decoding": Room(610, 10.05, "decoding/", "drafts, acceptance,\nsampling"),
    "model.inference": Room(610, 11.0, "inference/", "plain torch,\nKV cache"),
    "model.hugging_face": Room(905, 11.1, "hugging_face/", "names, sizes and tensors\nof a Llama"),
    "model": Room(740, 12.0, "model/", "trunk  heads  backward\nloss  config"),
    "model.structure": Room(890, 12.9, "structure/", "heads, parameters,\nshards, parts"),
    "model.memory": Room(740, 13.0, "memory/", "segments,\nprompts"),
    "model.operations": Room(606, 13.0, "operations/", "attention, norm,\nrotation, masks"),
    "foundation": Room(
        510, 13.9, "foundation/", "durable files, YAML, safetensors headers, pages of reports"
    ),
}
PACKAGES = (  # name, left, right, color of its rooms
    ("pipeline", 20, 1000, BLUE),
    ("data_prep", 20, 480, GREEN),
    ("model", 520, 1000, ORANGE),
)
WIDTH, TOP, ROW_HEIGHT, BOX_HEIGHT = 1020, 62, 62, 50


def draw(arrows: dict[Arrow, int]) -> Canvas:
    """Draw the arrows that no chain of others implies, and any that goes up, in red."""
    rooms = {name for arrow in arrows for name in arrow}
    if unknown := sorted(rooms - ROOMS.keys()):
        raise SystemExit(f"{', '.join(unknown)}: new in the tree; say in ROOMS where it is drawn")
    rows = max(ROOMS[name].row for name in rooms)
    canvas = Canvas(WIDTH, TOP + rows * ROW_HEIGHT + 55)
    for package, left, right, _ in PACKAGES:
        _frame(canvas, package, left, right)
    colors = {package: color for package, _, _, color in PACKAGES}
    boxes = {
        name: canvas.box(
            room.x,
            TOP + room.row * ROW_HEIGHT,
            _width(name),
            BOX_HEIGHT,
            color=colors.get(name.split(".")[0], GRAY),
            title=room.title,
            text=room.text,
        )
        for name, room in ROOMS.items()
        if name in rooms
    }
    up = [arrow for arrow in arrows if _goes_up(arrow)]
    down = needed_arrows({arrow: count for arrow, count in arrows.items() if arrow not in up})
    for arrow in (*down, *up):
        ends = [(ROOMS[name].x, TOP + ROOMS[name].row * ROW_HEIGHT) for name in arrow]
        if arrow.imported == "foundation":  # is as wide as the tree, so arrows may go straight down
            ends[1] = (ends[0][0], ends[1][1])
        canvas.arrow(
            ends[0],
            ends[1],
            color=RED if arrow in up else PALE_INK,
            both=(boxes[arrow.importer], boxes[arrow.imported]),
            bend=0.25 if arrow in up else 0.0,
        )
    return canvas


def _frame(canvas: Canvas, package: str, left: float, right: float) -> None:
    rows = [room.row for name, room in ROOMS.items() if name.split(".")[0] == package]
    top, bottom = (TOP + row * ROW_HEIGHT for row in (min(rows), max(rows)))
    middle, height = (top + bottom) / 2, bottom - top + BOX_HEIGHT + 30
    width = right - left
    canvas.box((left + right) / 2, middle, width, height, color="#fafbfc", dashed=True, layer=1)


def _goes_up(arrow: Arrow) -> bool:
    """Whether an arrow breaks the order of rooms: to a higher row, or out of a lower package."""
    importer, imported = (name.split(".")[0] for name in arrow)
    if importer == imported:
        return ROOMS[arrow.importer].row >= ROOMS[arrow.imported].row
    return imported != "foundation" and importer != "pipeline"


def _width(name: str) -> float:
    wide = {
        "pipeline": 250,
        "data_prep": 190,
        "foundation": 980,
        "model.generate": 130,
        "model.serve": 130,
        "model.beams": 78,
        "model.early_exit": 84,
        "model.joint_decoding": 112,
        "model.writing": 116,
        "model.streaming": 76,
        "model.serving": 108,
        "model.memory": 92,
    }
    return wide.get(name, 170 if name.startswith("model") else 114)


def description(arrows: dict[Arrow, int]) -> str:
    """All arrows as JSON, which the file carries so that a test can tell when it is stale."""
    return json.dumps([list(arrow) for arrow in arrows])


if __name__ == "__main__":
    all_arrows = room_arrows()
    draw(all_arrows).save(target("architecture.svg"), description(all_arrows))
