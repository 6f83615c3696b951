"""report.html: a run on one page, in one file that needs nothing else."""
from __future__ import annotations

import base64
import dataclasses
import html
import math
import os
import platform
import struct
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import numpy as np

import kernels
from gpt.corpus import Corpus
from gpt.data import batch
from gpt.decode import Decoder
from gpt.run import Run
from gpt.train import loss_and_gradients
from kernels.cpu import TARGET

Series = Mapping[str, Sequence[tuple[float, float]]]             # points by name
COLOURS = ("#d9730d", "#2f7ed8", "#8a8f98")
SHOWN = 12                                                       # samples, and layers and heads of attention
LOOKED_AT = 40                                                   # characters in the map of attention
CSS = """
:root { --ink: #1c2024; --soft: #5f6772; --line: #e3e6ea; --card: #fff; --page: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa2ad; --line: #343a42; --card: #1e2227; --page: #15181c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 10px; } p { margin: 4px 0 12px; }
p, dt, figcaption, th { color: var(--soft); }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.curves { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.curves text { font-size: 13px; } @media (min-width: 700px) { .curves text { font-size: 10.5px; } }
.numbers + p { margin-top: 12px; }
.numbers { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); }
.card, figure { margin: 0; min-width: 0; padding: 12px 14px; background: var(--card); border-radius: 8px;
  border: 1px solid var(--line); }
.card b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
figcaption { font-size: 14px; margin-bottom: 4px; } figcaption i { font-style: normal; margin-left: 10px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); }
svg .rule { stroke: var(--line); } svg .bar { fill: #2f7ed8; }
pre { margin: 4px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, monospace; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 16px; margin: 0;
  align-content: start;  font-size: 14px; }
dd { margin: 0; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: 13px; } th { font-weight: 400; text-align: left; }
td { padding: 3px 8px 3px 0; border-top: 1px solid var(--line); } td svg { height: 30px; }
.heads { display: grid; gap: 6px; }
img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
"""


RUNNING = '<b id="state">running</b>'
REFRESH = '<meta http-equiv="refresh" content="30">'              # the page looks for news by itself


def ended(page: str, state: str) -> str:
    """The page of a run that goes on no more."""
    return page.replace(REFRESH, "").replace(RUNNING, RUNNING.replace("running", state))


def report(run: Run, corpus: Corpus, tables: Mapping[str, float]) -> str:
    """The page, from a run that has been evaluated; what the text holds is escaped."""
    progress, config = run.progress, run.config
    last, best = progress.evaluations[-1], progress.best()
    assert best is not None
    numbers = {
        f"validation, nats a character; {last.val_bits:.4f} bits": f"{last.val_loss:.4f}",
        f"best validation, at step {best.step:,}": f"{best.val_loss:.4f}",
        "train, on a fixed part": f"{last.train_loss:.4f}",
        "steps": f"{last.step:,}",
        "seconds": f"{last.seconds:,.0f}",
        "tokens a second": f"{last.tokens_per_s:,.0f}",
    }
    reached = ", ".join(f"{name} {nats:.4f} nats ({nats / math.log(2):.4f} bits)"
                        for name, nats in tables.items())
    curves = [
        chart("loss, nats a character",
              _curves(run, train="train_loss", validation="val_loss", batches="batch_loss"), tables),
        chart("learning rate", _curves(run, rate="lr")),
        chart("norm of the gradients", _curves(run, norm="gradient_norm")),
        chart("tokens a second", _curves(run, speed="tokens_per_s")),
    ]
    facts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = [
        f"<h1>{_text(corpus.name)}</h1><p>{_parameters(run):,} parameters, {config.layers} layers, "
        f"{config.heads} heads, width {config.width}, context {config.context}; {RUNNING}</p>",
        f'<div class="numbers">{"".join(map(_number, numbers.items()))}</div>',
        f"<p>Tables of counts reach, on the same split: {reached} a character.</p>",
        f'<h2>Curves, by steps</h2><div class="curves">{"".join(curves)}</div>',
        f'<h2>Samples</h2><div class="grid">{_samples(run)}</div>',
        f"<h2>Attention</h2>{_attention(run, corpus)}",
        f'<h2>Layers</h2><div class="card">{_histograms(run, corpus)}</div>',
        '<h2>Config, machine and text</h2><div class="grid">',
        f"{_list(facts)}{_list(_machine(run, corpus))}</div>",
    ]
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{REFRESH}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(corpus.name)}, step {last.step:,}</title><style>{CSS}</style></head>\n<body>"
            + "\n".join(sections) + "</body></html>\n")
    return ended(page, "done") if progress.done else page


def _text(value: object) -> str:
    """Escaped, and control characters, which a page may not hold, as pictures of them."""
    shown = (chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value))
    return html.escape("".join(shown))


def _number(item: tuple[str, str]) -> str:
    return f'<div class="card"><b>{_text(item[1])}</b><span>{_text(item[0])}</span></div>'


def _list(facts: Mapping[str, object]) -> str:
    rows = (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f'<dl class="card">{"".join(rows)}</dl>'


def _parameters(run: Run) -> int:
    return sum(p.size for p in run.model.parameters())


def _machine(run: Run, corpus: Corpus) -> dict[str, object]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "numba", "safetensors"))
    return {"text": corpus.where, "sha256": corpus.sha256, "to train on": f"{len(corpus.train):,} characters",
            "to validate on": f"{len(corpus.validation):,} characters", "symbols": len(run.tokenizer),
            **{f"note {i}": note for i, note in enumerate(corpus.notes, 1)},
            "machine": f"{platform.machine()} with {TARGET.name}, {os.cpu_count()} cores, "
                       f"{kernels.get_num_threads()} threads", "system": platform.platform(),
            "products": kernels.get_matmul_precision(), "Python": sys.version.split()[0],
            "packages": packages}


# ---- curves ------------------------------------------------------------------------------------------------

def _curves(run: Run, **fields: str) -> Series:
    return {name: [(e.step, getattr(e, field)) for e in run.progress.evaluations]
            for name, field in fields.items()}


def chart(title: str, series: Series, levels: Mapping[str, float] | None = None) -> str:
    """Lines over steps as SVG, with dashed lines at those levels that lie among them."""
    width, height, left, bottom, top = 440, 210, 62, 22, 8
    ys = [y for points in series.values() for _, y in points]
    last = max(x for points in series.values() for x, _ in points)
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 8) * x / last, top + (height - bottom - top) * (high - y) / (high - low)
    parts = []
    for tick in ticks(low, high):
        y = place(0, tick)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
    for tick in ticks(0, last):
        x = place(tick, low)[0]
        anchor = "end" if x > width - 30 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{tick:,.6g}</text>')
    for name, level in (levels or {}).items():
        if low < level < high:
            y = place(0, level)[1]
            parts.append(f'<line stroke="currentColor" stroke-dasharray="3 4" opacity=".6" x1="{left}" '
                         f'x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         f'<text x="{width - 4}" y="{y - 4:.1f}" text-anchor="end">{_text(name)}</text>')
    colours = dict(zip(series, COLOURS, strict=False))
    for name, points in reversed(list(series.items())):
        where = [place(*point) for point in points]
        parts.append(f'<polyline fill="none" stroke="{colours[name]}" stroke-width="2" '
                     f'stroke-linejoin="round" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in where)}"/>')
        x, y = where[-1]
        parts.append(f'<circle r="3" cx="{x:.1f}" cy="{y:.1f}" fill="{colours[name]}"/>')
    names = "".join(f'<i style="color:{colours[name]}">{_text(name)}</i>' for name in series) \
        if len(series) > 1 else ""
    return (f'<figure><figcaption>{_text(title)}{names}</figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg></figure>')


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from low to high."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * min((m for m in (1, 2, 5, 10) if m * size >= rough * 0.99), default=10)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ---- samples, layers, attention ----------------------------------------------------------------------------

def _samples(run: Run) -> str:
    """Of all samples as training went on at most twelve, the first and the last among them."""
    samples = run.progress.samples
    places = np.linspace(0, len(samples) - 1, min(SHOWN, len(samples)))
    chosen = sorted(set(places.round().astype(int).tolist()))
    return "".join(f"<figure><figcaption>step {samples[i][0]:,}</figcaption><pre>{_text(samples[i][1])}</pre>"
                   "</figure>" for i in chosen) or '<p class="card">--sample is 0</p>'


def _histograms(run: Run, corpus: Corpus) -> str:
    """A row a layer: how its parameters, and their gradients on one batch without dropout, are spread."""
    model, config = run.model, run.config
    x, y = batch(corpus.train, config.batch, config.context, config.seed, 0)
    model.eval()
    loss_and_gradients(model, x, y, config.micro_batch)
    model.train()
    layers: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        values, gradients = layers.setdefault(".".join(parts[:2 if parts[0] == "blocks" else 1]), ([], []))
        values.append(p.data.ravel())
        if p.grad is not None:
            gradients.append(p.grad.data.ravel())
    model.zero_grad()
    rows = []
    for name, kinds in layers.items():
        cells = "".join(f"<td>{_histogram(np.concatenate(kind))}</td>" for kind in kinds if kind)
        rows.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    return ("<table><tr><th>layer</th><th>parameters, within 4 standard deviations of 0</th>"
            f"<th>their gradients, likewise</th></tr>{''.join(rows)}</table>")


def _histogram(values: np.ndarray) -> str:
    """Bars within four standard deviations of 0 (roots of the mean square), and the deviation."""
    deviation = math.sqrt(float(np.mean(np.square(values, dtype=np.float64)))) or 1.0
    counts = np.histogram(values, bins=40, range=(-4 * deviation, 4 * deviation))[0]
    bars = "".join(f'<rect class="bar" x="{6 * i}" y="{30 - h:.1f}" width="5" height="{h:.1f}"/>'
                   for i, h in enumerate(30 * counts / max(1, counts.max())) if h > 0.05)
    return f'<svg viewBox="0 0 240 30" preserveAspectRatio="none">{bars}</svg>± {deviation:.2e}'


def _attention(run: Run, corpus: Corpus) -> str:
    """What each head looks at in the last sample, or in the text to validate on where there is none."""
    text = run.progress.samples[-1][1] if run.progress.samples else ""
    ids = run.tokenizer.encode(text)[:min(LOOKED_AT, run.config.context)]
    if len(ids) < 2:
        ids = np.asarray(corpus.validation[:min(LOOKED_AT, run.config.context)])
    decoder = Decoder(run.model)
    decoder(ids)
    heads = min(SHOWN, run.config.heads)
    maps = "".join(f'<img src="{png(weights[head])}" alt="layer {layer}, head {head}" '
                   f'title="layer {layer}, head {head}">'
                   for layer, weights in enumerate(decoder.weights[:SHOWN]) for head in range(heads))
    together = np.mean([weights.mean(axis=0) for weights in decoder.weights], axis=0)
    return ('<div class="grid"><figure><figcaption>all heads together: a row is a character, dark is where '
            f"it looks</figcaption>{_labelled(together, run.tokenizer.decode(ids))}</figure>"
            "<figure><figcaption>each by itself: a row of maps is a layer</figcaption>"
            f'<div class="heads" style="grid-template-columns: repeat({heads}, 1fr)">{maps}</div></figure>'
            "</div>")


def _labelled(weights: np.ndarray, text: str) -> str:
    """One map with its text along both sides."""
    n, cell = len(text), 12
    names: Iterable[str] = (_text({"\n": "↵", " ": "·"}.get(c, c)) for c in text)
    labels = "".join(f'<text font-size="11" x="{cell * i + 20}" y="12" text-anchor="middle">{c}</text>'
                     f'<text font-size="11" x="7" y="{cell * i + 26}" text-anchor="middle">{c}</text>'
                     for i, c in enumerate(names))
    side = cell * n
    return (f'<svg viewBox="0 0 {side + 15} {side + 17}" role="img">{labels}<image x="14" y="16" '
            f'width="{side}" height="{side}" style="image-rendering: pixelated" preserveAspectRatio="none" '
            f'href="{png(weights)}"/></svg>')


def png(weights: np.ndarray) -> str:
    """A matrix of 0 to 1 as a picture in a data URL: white for 0, dark blue for the largest of its row."""
    share = weights / weights.max(axis=-1, keepdims=True)
    white, blue = np.array([255.0, 255, 255]), np.array([16.0, 60, 130])
    pixels = (white + (blue - white) * share[..., None]).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    size = struct.pack(">IIBBBBB", weights.shape[1], weights.shape[0], 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows, 9)) \
        + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(content).decode()
