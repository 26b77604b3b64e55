"""One step, head by head, and what it costs: `python -m docs.pictures.sequential_backward`.

The bars are the figures of benchmarks/results/memory_vs_heads-cpu.json; nothing is typed in.
"""

import json

from docs.pictures.canvas import (
    BLUE,
    EDGES,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PALE_INK,
    Canvas,
    target,
)
from docs.pictures.import_graph import ROOT

HEADS = 4
RESULTS = ROOT / "benchmarks" / "results" / "memory_vs_heads-cpu.json"
VOCABULARY = 131072
_WIDTH, _HEIGHT = 1020, 480


def draw() -> Canvas:
    """Both halves of the picture."""
    canvas = Canvas(_WIDTH, _HEIGHT)
    _draw_step(canvas)
    _draw_memory(canvas)
    return canvas


def _draw_step(canvas: Canvas) -> None:
    canvas.label(20, 24, "One step, head by head", size=11, bold=True, align="left")
    trunk = canvas.box(
        110,
        230,
        150,
        330,
        color=BLUE,
        title="trunk",
        text="embedding and\nL - n layers\n\nruns once",
    )
    copy = canvas.box(
        258,
        230,
        84,
        330,
        color=GRAY,
        title="z",
        text="the trunk's\noutput,\ndetached\n\ncollects\nthe heads'\ngradients",
    )
    canvas.arrow((185, 160), (216, 160))
    for index in range(HEADS):
        y = 92 + index * 92
        first = index == 0
        head = canvas.box(
            372,
            y,
            84,
            56,
            color=ORANGE,
            title=f"head {index + 1}",
            text=f"predicts t+{index + 1}",
            dashed=not first,
        )
        loss = canvas.box(
            510,
            y,
            124,
            56,
            color=GREEN,
            title="LM head, loss",
            text="logits of one chunk\nof tokens at a time",
            dashed=not first,
        )
        canvas.arrow((300, y - 9), (330, y - 9))
        canvas.arrow((414, y - 9), (448, y - 9))
        canvas.arrow((448, y + 11), (414, y + 11), color=EDGES[ORANGE], dashed=True)
        canvas.arrow((330, y + 11), (300, y + 11), color=EDGES[ORANGE], dashed=True)
        assert head is not None
        assert loss is not None
        if index:
            canvas.arrow((440, y - 62), (440, y - 30), width=0.9)
            canvas.label(449, y - 46, "then", size=7, color=PALE_INK, align="left")
    canvas.arrow((216, 305), (185, 305), color=EDGES[ORANGE], dashed=True)
    assert trunk is not None
    assert copy is not None
    canvas.arrow((22, 424), (52, 424))
    canvas.label(58, 424, "forward", size=8, align="left")
    canvas.arrow((150, 424), (120, 424), color=EDGES[ORANGE], dashed=True)
    canvas.label(157, 424, "backward", size=8, align="left")
    canvas.label(
        20,
        456,
        "Only one head's activations and logits exist at a time; solid boxes: while head 1 runs.",
        size=8,
        color=PALE_INK,
        align="left",
    )


def _draw_memory(canvas: Canvas) -> None:
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    peaks = {
        (point["heads"], point["mode"]): point["peak_bytes"] / 2**30
        for point in content["points"]
        if point["vocabulary"] == VOCABULARY
    }
    counts = sorted({heads for heads, _ in peaks})
    left, bottom, width, height = 660, 395, 335, 318
    scale = height / max(peaks.values())
    canvas.label(
        left - 10, 24, "Peak memory of a step in GiB, by heads", size=11, bold=True, align="left"
    )
    step = width / len(counts)
    for number, heads in enumerate(counts):
        x = left + (number + 0.5) * step
        for mode, shift, color in (("joint", -8.5, GRAY), ("sequential", 8.5, ORANGE)):
            value = peaks[heads, mode]
            top = bottom - value * scale
            canvas.bar(x + shift, top, 15, bottom - top, color=color)
            if heads in (counts[0], counts[-1]):
                canvas.label(x + shift * 1.6, top - 9, f"{value:.2f}", size=7.5)
        canvas.label(x, bottom + 13, str(heads), size=8)
    canvas.bar(left + 8, 62, 11, 11, color=GRAY)
    canvas.label(left + 19, 68, "all heads' logits, one backward", size=8, align="left")
    canvas.bar(left + 8, 83, 11, 11, color=ORANGE)
    canvas.label(left + 19, 89, "head by head, chunk by chunk (Headway)", size=8, align="left")
    load = content["workload"]
    canvas.label(
        left - 10,
        444,
        f"{load['layers']} layers in all, hidden size {load['hidden_size']}, "
        f"vocabulary {VOCABULARY:,},\n"
        f"{load['batch']} x {load['sequence']} tokens, fp32; "
        f"{content['hardware']}; {content['date']}",
        size=7.5,
        color=PALE_INK,
        align="left",
    )
    canvas.line((left - 6, bottom), (left + width, bottom), color=INK)


if __name__ == "__main__":
    draw().save(target("sequential_backward.svg"))
