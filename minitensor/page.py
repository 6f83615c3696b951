"""What a trace and a Tensor look like in a browser: one page with everything in it, or a small picture."""
from __future__ import annotations

import base64
import html
import itertools
import json
import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np

from minitensor.tensor import Tensor
from minitensor.trace import Step, Summary, Trace, number, summary

SHOWN = 64                                   # elements whose numbers a page shows; of others, the colours
WIDTH, GAP = 160, 28                         # of a box, and between boxes or lines


def trace_html(trace: Trace) -> str:
    """The page: the template with the trace's data in it."""
    data = json.dumps(_data(trace), separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":                      # so that no text in it can end the script
        data = data.replace(character, f"\\u{ord(character):04x}")
    template = resources.files("minitensor").joinpath("trace.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", data)


def frame_html(trace: Trace) -> str:
    """The page in a frame of its own, for a notebook."""
    style = "width: 100%; height: 680px; border: 1px solid #8884; border-radius: 8px"
    return (f'<iframe srcdoc="{html.escape(trace_html(trace))}" sandbox="allow-scripts" '
            f'title="backward pass" style="{style}"></iframe>')


def tensor_html(x: Tensor) -> str:
    """A Tensor in a notebook: what it is, its values in colour, and its gradient's."""
    made = f", made by {x.node.op.__name__}" if x.node else ", requires a gradient" * x.requires_grad
    parts = [f"<b>Tensor</b> {html.escape(f'{x.shape} {x.dtype}{made}')}", _picture(summary(x.data))]
    if x.grad is not None:
        parts += ["gradient", _picture(summary(x.grad.data))]
    return '<div style="font: 13px system-ui; line-height: 1.6">' + "".join(
        f"<div>{part}</div>" for part in parts) + "</div>"


def _picture(s: Summary) -> str:
    """A heat map as a table: orange above 0, blue below, grey infinite, with numbers where there are few."""
    peak = _peak(s)
    cells = []
    for row in s.sample:
        cells.append("<tr>")
        for x in row:
            share = abs(x) / peak if np.isfinite(x) else 1
            colour = "222, 115, 30" if x > 0 else "52, 120, 190"
            if not np.isfinite(x):
                colour = "190, 40, 160" if np.isnan(x) else "140, 143, 150"
            text = number(x, 3) if s.sample.size <= SHOWN else ""
            cells.append(f'<td style="background: rgba({colour}, {0.85 * share:.2f}); text-align: right; '
                         f'padding: {"1px 6px" if text else "3px"}">{text}</td>')
        cells.append("</tr>")
    note = f"<div>{_note(s)}</div>" if s.sample.size < math.prod(s.shape) else ""
    return f'<table style="border-collapse: collapse; font-size: 12px">{"".join(cells)}</table>{note}'


def _peak(s: Summary) -> float:
    """What the strongest colour stands for."""
    finite = np.abs(s.sample[np.isfinite(s.sample)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _note(s: Summary) -> str:
    """Which elements the sample holds: "[0, 0], 32 of 64 rows, 32 of 128 columns"."""
    note = [str([0] * (len(s.shape) - 2))] if len(s.shape) > 2 else []
    whole = (1, 1, *s.shape)[-2:]
    note += [f"{shown} of {there} {axis}" for shown, there, axis in
             zip(s.sample.shape, whole, ("rows", "columns"), strict=True) if shown < there]
    return ", ".join(note)


# ---- the page's data ---------------------------------------------------------------------------------------

def _data(trace: Trace) -> dict[str, Any]:
    """Steps, sources and arrays; what several steps share is written once and referred to by its index."""
    arrays: dict[int, tuple[int, Summary]] = {}
    sources: dict[tuple, int] = {}

    def array(s: Summary) -> int:
        return arrays.setdefault(id(s), (len(arrays), s))[0]

    x, layer, buses = layout(trace.steps)
    steps = [{
        "op": step.op, "name": step.name, "module": step.module, "file": step.file, "line": step.line,
        "code": step.code, "options": step.options, "constants": step.constants,
        "value": array(step.value), "gradient": array(step.gradient),
        "received": [[flow.step, flow.argument, array(flow.gradient)] for flow in step.received],
        "sent": [[flow.step, flow.argument, array(flow.gradient)] for flow in step.sent],
        "source": sources.setdefault((step.source, tuple(step.vjp_lines)), len(sources)),
        "x": x[i], "layer": layer[i], "bus": buses[i],
    } for i, step in enumerate(trace.steps)]
    return {"steps": steps, "sources": list(sources), "arrays": [_array(s) for _, s in arrays.values()]}


def _array(s: Summary) -> dict[str, Any]:
    statistics = {name: float(f"{getattr(s, name):.7g}") if math.isfinite(getattr(s, name)) else None
                  for name in ("min", "max", "mean", "std", "zeros")}
    picture: dict[str, Any] = {"rows": s.sample.shape[0], "columns": s.sample.shape[1], "note": _note(s)}
    if s.sample.size <= SHOWN:
        picture["numbers"] = [float(f"{x:.7g}") if math.isfinite(x) else str(x)
                              for x in s.sample.ravel().tolist()]
    else:
        levels = np.nan_to_num(np.rint(126 * (s.sample / _peak(s))), nan=-128, posinf=127, neginf=-127)
        picture["levels"] = base64.b64encode(levels.astype(np.int8).tobytes()).decode()
        picture["peak"] = float(f"{_peak(s):.4g}")
    return {"shape": s.shape, "dtype": s.dtype, "nonfinite": s.nonfinite, **statistics, **picture}


# ---- the graph in layers -----------------------------------------------------------------------------------

def layout(steps: list[Step]) -> tuple[list[float], list[int], list[list[float]]]:
    """Each step's x and layer, and the x of its bus in the layers above it (Sugiyama's method).

    A layer is the length of the longest way from the loss. All gradients that a step receives from further
    away than the layer above it join its bus, one line that goes down beside the boxes. Where buses would
    have very many points, edges of more than 64 layers are drawn straight.
    """
    layer, height = [0] * len(steps), [0] * len(steps)       # longest ways from the top and to the bottom
    for i, step in enumerate(steps):                         # a sender precedes its receivers
        for flow in step.sent:
            layer[flow.step] = max(layer[flow.step], layer[i] + 1)
    for i in range(len(steps) - 1, -1, -1):
        below = [flow.step for flow in steps[i].sent]
        height[i] = max((layer[j] - layer[i] + height[j] for j in below), default=0)

    def reach(i: int, most: float) -> int:
        spans = (layer[i] - layer[flow.step] for flow in steps[i].received)
        return max((span for span in spans if span <= most), default=1)

    most = math.inf if sum(reach(i, math.inf) for i in range(len(steps))) <= 20_000 else 64
    at = list(layer)                                         # the layer of each point: steps, then buses
    above: list[list[int]] = [[] for _ in steps]             # the points in the layer above that lead to it
    buses: list[list[int]] = []
    for i, step in enumerate(steps):
        bus = list(range(len(at), len(at) + reach(i, most) - 1))
        first = layer[i] - len(bus)
        at += range(first, layer[i])
        height += [layer[i] - row + height[i] for row in range(first, layer[i])]
        above += [[] for _ in bus]
        buses.append(bus)
        column = [*bus, i]
        for upper, lower in itertools.pairwise(column):
            above[lower].append(upper)
        for sender in {flow.step for flow in step.received}:
            if layer[sender] + 1 >= first:
                above[column[layer[sender] + 1 - first]].append(sender)
    x = _coordinates(at, above, height, len(steps))
    left = min(x)
    x = [round(v - left, 1) for v in x]
    return x[:len(steps)], layer, [[x[point] for point in bus] for bus in buses]


def _coordinates(at: list[int], above: list[list[int]], height: list[int], boxes: int) -> list[float]:
    """The x of each point; the first `boxes` points are boxes, the others lines."""
    below: list[list[int]] = [[] for _ in at]
    rows: list[list[int]] = [[] for _ in range(max(at) + 1)]
    for point, uppers in enumerate(above):
        rows[at[point]].append(point)
        for upper in uppers:
            below[upper].append(point)
    x = [0.0] * len(at)

    def distance(p: int, q: int) -> float:
        return ((p < boxes) + (q < boxes)) * WIDTH / 2 + GAP

    for turn in range(8):                                    # down, up, ...: order by the mean neighbour
        for row in rows if turn % 2 == 0 else rows[::-1]:
            near = below if turn % 2 else above
            wished = {p: sum(x[q] for q in near[p]) / len(near[p]) if near[p] else x[p] for p in row}
            row.sort(key=lambda p: wished[p])
            _place(row, [wished[p] for p in row], [1] * len(row), distance, x)

    heir = {p: max(lower, key=lambda q: (height[q], q < boxes)) for p, lower in enumerate(below) if lower}
    for row in rows:                                         # straight down to the heir, the others beside it
        place = {p: i for i, p in enumerate(row)}
        wishes: list[float] = []
        weights: list[float] = []
        for p in row:
            parents = [q for q in above[p] if heir[q] == p]
            parent = min(parents or above[p], default=p)
            side = 0 if parents or parent == p else 1 if place[p] > place[heir[parent]] else -1
            wishes.append(x[parent] + side * distance(p, heir.get(parent, p)))
            weights.append(100 if parents and p < boxes else 10 if parents else 1)
        _place(row, wishes, weights, distance, x)
    return x


def _place(row: list[int], wishes: Sequence[float], weights: Sequence[float],
           distance: Callable[[int, int], float], x: list[float]) -> None:
    """Move a row's points as little as keeping their order and distances asks, by weighted least squares.

    Without the distances it is isotonic regression, which pools neighbours that are in the wrong order.
    """
    offsets = list(itertools.accumulate((distance(p, q) for p, q in itertools.pairwise(row)), initial=0.0))
    pools: list[tuple[float, float, int]] = []               # mean, weight, how many points
    for wish, weight, offset in zip(wishes, weights, offsets, strict=True):
        mean, count = wish - offset, 1
        while pools and pools[-1][0] > mean:
            before, more, n = pools.pop()
            mean, weight = (before * more + mean * weight) / (more + weight), more + weight
            count += n
        pools.append((mean, weight, count))
    means = itertools.chain.from_iterable([mean] * count for mean, _, count in pools)
    for p, mean, offset in zip(row, means, offsets, strict=True):
        x[p] = mean + offset
