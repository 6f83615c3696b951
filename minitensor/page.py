"""What a trace and a Tensor look like in a browser: one page with everything in it, or a small picture."""
from __future__ import annotations

import base64
import html
import json
import math
from importlib import resources
from typing import Any

import numpy as np

from minitensor.tensor import Tensor
from minitensor.trace import Step, Summary, Trace, number, summary

SHOWN = 64                                   # elements whose numbers a page shows; of others, the colours
WIDTH, GAP = 148, 28                         # of a box, and between boxes; the lines take less


def trace_html(trace: Trace) -> str:
    """The page: the template with the trace's data in it."""
    data = json.dumps(_data(trace), separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":                      # so that no text in it can end the script
        data = data.replace(character, f"\\u{ord(character):04x}")
    template = resources.files("minitensor").joinpath("trace.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", data)


def frame_html(trace: Trace) -> str:
    """The page in a frame of its own, for a notebook."""
    return (f'<iframe srcdoc="{html.escape(trace_html(trace))}" sandbox="allow-scripts" title="backward pass" '
            'style="width: 100%; height: 680px; border: 1px solid #8884; border-radius: 8px"></iframe>')


def tensor_html(x: Tensor) -> str:
    """A Tensor in a notebook: what it is, its values in colour, and its gradient's."""
    made = f", made by {x.node.op.__name__}" if x.node else ", requires a gradient" * x.requires_grad
    parts = [f"<b>Tensor</b> {html.escape(f'{x.shape} {x.dtype}{made}')}", _picture(summary(x.data))]
    if x.grad is not None:
        parts += ["gradient", _picture(summary(x.grad.data))]
    return '<div style="font: 13px system-ui; line-height: 1.6">' + "".join(
        f"<div>{part}</div>" for part in parts) + "</div>"


def _picture(s: Summary) -> str:
    """A heat map as a table: orange above 0, blue below, with numbers where there are few."""
    peak = _peak(s)
    cells = []
    for row in s.sample:
        cells.append("<tr>")
        for x in row:
            share = abs(x) / peak if np.isfinite(x) else 1
            colour = ("222, 115, 30" if x > 0 else "52, 120, 190") if np.isfinite(x) else "190, 40, 160"
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
        finite = np.isfinite(s.sample)
        levels = np.where(finite, np.rint(127 * np.where(finite, s.sample, 0) / _peak(s)), -128)
        picture["levels"] = base64.b64encode(levels.astype(np.int8).tobytes()).decode()
        picture["peak"] = float(f"{_peak(s):.4g}")
    return {"shape": s.shape, "dtype": s.dtype, "nonfinite": s.nonfinite, **statistics, **picture}


# ---- the graph in layers -----------------------------------------------------------------------------------

def layout(steps: list[Step]) -> tuple[list[float], list[int], list[list[float]]]:
    """Each step's x and layer, and the x of its bus in the layers above it (Sugiyama's method).

    A layer is the length of the longest way from the loss. All gradients that a step receives from further
    away than the layer above it join its bus, one vertical line, so that edges pass beside the boxes. Where
    that would need very many points, edges of more than 64 layers are drawn straight.
    """
    layer = [0] * len(steps)
    for i, step in enumerate(steps):                         # a sender precedes its receivers
        for flow in step.sent:
            layer[flow.step] = max(layer[flow.step], layer[i] + 1)

    def reach(i: int, most: float) -> int:
        spans = [layer[i] - layer[flow.step] for flow in steps[i].received]
        return max((span for span in spans if span <= most), default=1)

    most = math.inf if sum(reach(i, math.inf) for i in range(len(steps))) <= 20_000 else 64
    above: list[list[int]] = [[] for _ in steps]             # of each point: its neighbours one layer up
    at = list(layer)                                         # the layer of each point; points after steps: buses
    bus: list[list[int]] = []
    for i, step in enumerate(steps):
        points = list(range(len(at), len(at) + reach(i, most) - 1))
        first = layer[i] - len(points)
        at += range(first, layer[i])
        above += [[] for _ in points]
        bus.append(points)
        column = [*points, i]
        for upper, lower in zip(column, column[1:], strict=False):
            above[lower].append(upper)
        for flow in step.received:
            entry = layer[flow.step] + 1 - first
            if entry >= 0:
                above[column[entry]].append(flow.step)
    below: list[list[int]] = [[] for _ in at]
    for lower, uppers in enumerate(above):
        for upper in uppers:
            below[upper].append(lower)

    rows: list[list[int]] = [[] for _ in range(max(at) + 1)]
    for point in sorted(range(len(at)), key=lambda point: point < len(steps)):
        rows[at[point]].append(point)
    x = [0.0] * len(at)
    width = [float(WIDTH)] * len(steps) + [0.0] * (len(at) - len(steps))
    for turn in range(8):                                    # down, up, down, ...: towards the neighbours' mean
        for row in rows if turn % 2 == 0 else rows[::-1]:
            near = above if turn % 2 == 0 else below
            wished = {p: sum(x[q] for q in near[p]) / len(near[p]) if near[p] else x[p] for p in row}
            row.sort(key=lambda p: wished[p])
            _place(row, wished, width, x)
    left = min(x)
    x = [round(v - left, 1) for v in x]
    return x[:len(steps)], layer, [[x[point] for point in points] for points in bus]


def _place(row: list[int], wished: dict[int, float], width: list[float], x: list[float]) -> None:
    """Give a row's points, in their order, the x they wish, but no two boxes overlap.

    Packed from the left and packed from the right keep the distances, so their mean does too.
    """
    distance = [(width[p] + width[q]) / 2 + GAP for p, q in zip(row, row[1:], strict=False)]
    right, left = [wished[p] for p in row], [wished[p] for p in row]
    for i, d in enumerate(distance):
        right[i + 1] = max(right[i + 1], right[i] + d)
    for i in range(len(distance) - 1, -1, -1):
        left[i] = min(left[i], left[i + 1] - distance[i])
    for p, a, b in zip(row, left, right, strict=True):
        x[p] = (a + b) / 2
