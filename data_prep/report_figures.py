# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The figures of measure_dataset.py's report, each in the colours of a light and of a dark page."""

import io

import numpy as np
from matplotlib.figure import Figure

THEMES = {
    "light": {"ink": "#1f2430", "soft": "#6b7280", "grid": "#e5e7eb", "main": "#2563eb", "mark": "#c2410c"},
    "dark": {"ink": "#e5e7eb", "soft": "#9aa3b2", "grid": "#333a46", "main": "#7aa2f7", "mark": "#f0a060"},
}


def new_figure(colors, across, up="", height=2.6):
    """Return (figure, axes) in a theme's colours with words at the axes; transparent: the page shows through."""
    figure = Figure(figsize=(7.4, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors["soft"])
    axes.tick_params(colors=colors["soft"], length=0, labelsize=9)
    axes.grid(axis="y", color=colors["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(across, color=colors["ink"], fontsize=9)
    axes.set_ylabel(up, color=colors["ink"], fontsize=9)
    return figure, axes


def draw_lengths(colors, lengths, part, limit):
    """Return a histogram of token lengths with the maximum marked; the longest half percent lies beyond its edge."""
    figure, axes = new_figure(colors, f"tokens of the {part}", "rows")
    edge = max(int(np.percentile(lengths, 99.5)), limit or 0, 1) * 1.03
    step = max(int(edge / 60), 1)
    bins = np.arange(0, edge + step, step)
    heights, _, _ = axes.hist(np.minimum(lengths, edge), bins, color=colors["main"], rwidth=0.9)
    if lengths.max() > edge:
        top = heights[-1] + 0.02 * axes.get_ylim()[1]
        axes.text(edge + step, top, "longer", color=colors["soft"], ha="right", va="bottom", fontsize=8)
    if limit:
        axes.axvline(limit, color=colors["mark"], linewidth=1.6)
        label = f"maximum {limit:,} "
        axes.text(limit, axes.get_ylim()[1] * 0.98, label, color=colors["mark"], ha="right", va="top", fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0, edge + step)
    return figure


def draw_cut(colors, lengths, maxima):
    """Return the share of rows that is cut at each possible maximum, a line for each part."""
    figure, axes = new_figure(colors, "maximum length in tokens (the dot: the one recommended or given)", "rows cut")
    shades = [colors["main"], colors["mark"], colors["soft"]]
    for (part, row), shade in zip(lengths.items(), shades, strict=False):
        limits = np.unique(np.geomspace(4, max(int(row.max()), 8), 200).astype(int))
        share = 1 - np.searchsorted(np.sort(row), limits, side="right") / len(row)
        axes.plot(limits, share, color=shade, linewidth=2, label=part)
        if part in maxima:
            axes.plot(maxima[part][1], (row > maxima[part][1]).mean(), "o", color=shade, markersize=6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, labelcolor=colors["ink"], fontsize=9)
    return figure


def draw_bars(colors, names, values, texts, label):
    """Return horizontal bars, the first on top, each with its value written at its end."""
    figure, axes = new_figure(colors, label, height=0.75 + 0.32 * len(names))
    axes.barh(range(len(names)), values, color=colors["main"], height=0.62)
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.text(value, place, f"  {text}", va="center", fontsize=9, color=colors["ink"])
    axes.set_yticks(range(len(names)), names, fontsize=9, color=colors["ink"])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, max(values) * 1.22)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    return figure


def draw_figures(measures, lengths, ways):
    """Return {name: {theme: PNG bytes}}. lengths: {part: array of all rows}; ways: names of the ways of batching."""
    maxima, drawings = measures["maxima"], {}
    for part, row in lengths.items():
        drawings[f"{part}_lengths"] = (draw_lengths, row, part, maxima.get(part, (None, None))[1])
    drawings["cut"] = (draw_cut, lengths, maxima)
    if "padding" in measures:
        values = {ways[name]: way["per_real"] for name, way in measures["padding"]["ways"].items()}
        texts = [f"{value:.2f}" for value in values.values()]
        drawings["padding"] = (draw_bars, list(values), list(values.values()), texts, "positions for each real one")
    if measures["labels"]:
        top = measures["labels"][:15]
        names = ["(none)" if entry["label"] is None else entry["label"][:30] for entry in top]
        texts = [f"{entry['rows']:,} ({entry['share']:.1%})" for entry in top]
        drawings["labels"] = (draw_bars, names, [entry["rows"] for entry in top], texts, "rows")
    figures = {}
    for name, (draw, *inputs) in drawings.items():
        figures[name] = {}
        for theme, colors in THEMES.items():
            stream = io.BytesIO()
            draw(colors, *inputs).savefig(stream, format="png")
            figures[name][theme] = stream.getvalue()
    return figures
