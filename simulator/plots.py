"""Pictures of a comparison, each as the bytes of a PNG: latency over time, bars, a curve over swept values, and which
node ran which blocks when. matplotlib draws them and is imported only then: what runs agents does without it."""

import importlib.util
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from typing import TYPE_CHECKING

from schemas.errors import ErrorCode, ResplitError
from simulator.metrics import actions
from simulator.records import Epoch, Spell
from simulator.results import Timeline
from simulator.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDTH = 9.0
"""Inches, at 110 dots each: legible on a phone held upright, and in print."""
DPI = 110
NODES_SHOWN = 40
"""Rows of a Gantt chart that can be told apart."""
LABELS_SHOWN = 30
"""Epochs whose numbers fit beside each other."""
# Okabe and Ito: told apart by the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", ":", "-.")
GREY = "#8c8c8c"
FAULT = "#d55e00"
DARKER_AT = (1, 2, 4, 8)
"""Faults at once from which on their shade is darker."""
EVERYWHERE = ("cloud-links", "orchestrator")
"""What a fault may be about that is no node's and no site's."""
Lines = Mapping[str, Sequence[tuple[float, Interval]]]


def require() -> None:
    """Raises `ResplitError` where nothing can be drawn; asked before an hour is spent on what is to be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        message = "plots need matplotlib; `make setup` installs it, or pip install 'matplotlib>=3.11'"
        raise ResplitError(ErrorCode.MISSING_DEPENDENCY, message)


def timeline(shown: Timeline) -> bytes:
    """Latency (p50 and p95 of what completed) and failures by time of arrival; faults shaded, epochs as lines."""
    figure = _figure(5.6)
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1.3, 1.3))
    times = [point.at_s for point in shown.bins]
    for name, values, colour in (
        ("p50", [point.p50_ms for point in shown.bins], COLOURS[0]),
        ("p95", [point.p95_ms for point in shown.bins], COLOURS[4]),
    ):
        upper.plot(times, [float("nan") if value is None else value for value in values], color=colour, label=name)
    if any(point.p50_ms for point in shown.bins):
        upper.set_yscale("log")
        _plain(upper.yaxis)
    upper.set_ylabel("latency (ms)")
    width = (shown.end_s - shown.begin_s) / max(1, len(shown.bins))
    middle.bar(times, [point.arrived for point in shown.bins], width, align="edge", color=GREY, label="arrived")
    failed = [point.failed for point in shown.bins]
    middle.bar(times, failed, width, align="edge", color=FAULT, label="not completed")
    middle.set_ylabel(f"requests\nper {width:.3g} s")
    lower.plot([s.at_s for s in shown.samples], [100 * s.busy for s in shown.samples], color=COLOURS[2], label="busy")
    lower.set_ylim(0, 105)
    lower.set_ylabel("nodes\nbusy (%)")
    lower.set_xlabel("time (s)")
    _shade(shown, (upper, middle, lower), shown.spells)
    _number(upper, shown.epochs, shown.begin_s, shown.end_s)
    lower.set_xlim(shown.begin_s, shown.end_s)
    upper.legend(loc="lower right", fontsize=8, ncols=4)
    middle.legend(loc="upper right", fontsize=8, ncols=2)
    figure.suptitle(f"{shown.policy}, seed {shown.seed}: latency, epochs (lines) and faults (shaded)")
    return _png(figure)


def bars(title: str, values: Mapping[str, Interval | None], marked: Sequence[str] = ()) -> bytes:
    """A metric of every policy, in the order given, with 95 % intervals; the policies of `marked` in colours."""
    figure = _figure(1.1 + 0.3 * max(3, len(values)))
    axes = figure.subplots()
    for row, (name, found) in enumerate(values.items()):
        if found is None:
            axes.text(0, row, " none", va="center", fontsize=8)
            continue
        # A bootstrap's interval holds its mean, so neither length is negative.
        reach = [[found.mean - found.low], [found.high - found.mean]]
        colour = COLOURS[marked.index(name)] if name in marked else GREY
        axes.barh(row, found.mean, color=colour, height=0.65, xerr=reach, capsize=3, error_kw={"linewidth": 1.2})
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel(f"{title} (mean and 95 % interval over seeds)")
    return _png(figure)


def curve(title: str, axis: str, lines: Lines) -> bytes:
    """A metric over the swept value, a line for each policy and its 95 % interval as a band."""
    figure = _figure(max(4.4, 0.8 + 0.2 * len(lines)))
    axes = figure.subplots()
    looks = zip(cycle(COLOURS), (style for style in cycle(STYLES) for _ in COLOURS), cycle("osv^D"), strict=False)
    for (name, unsorted), (colour, style, marker) in zip(lines.items(), looks, strict=False):
        points = sorted(unsorted, key=lambda point: point[0])
        at = [x for x, _ in points]
        axes.plot(
            at, [y.mean for _, y in points], linestyle=style, marker=marker, markersize=4, color=colour, label=name
        )
        axes.fill_between(at, [y.low for _, y in points], [y.high for _, y in points], color=colour, alpha=0.15, lw=0)
    values = sorted({x for points in lines.values() for x, _ in points})
    if values and values[0] > 0 and values[-1] / values[0] >= 10:
        axes.set_xscale("log")
    if len(values) <= 12:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return _png(figure)


def violins(title: str, values: Mapping[str, Sequence[float]], marked: Sequence[str] = ()) -> bytes:
    """How a figure is spread over seeds, for every policy; those of `marked` in colours."""
    figure = _figure(1.1 + 0.45 * max(3, len(values)))
    axes = figure.subplots()
    for row, (name, found) in enumerate(values.items()):
        colour = COLOURS[marked.index(name)] if name in marked else GREY
        if len(set(found)) > 1:
            drawn = axes.violinplot([found], [row], orientation="horizontal", widths=0.8, showextrema=False)
            for body in drawn["bodies"]:  # type: ignore[attr-defined]  # a list, by its documentation
                body.set_facecolor(colour)
                body.set_alpha(0.5)
        axes.plot(found, [row] * len(found), "|", color=colour, markersize=6)
        if found:
            axes.plot(sum(found) / len(found), row, "o", color="black", markersize=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel(f"{title} (strokes: seeds; points: means)")
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def scatter(across: str, up: str, points: Mapping[str, Sequence[tuple[float, float, str]]]) -> bytes:
    """One figure against another, both above 0: a line through the points of each policy, and a word beside each."""
    figure = _figure(max(4.4, 0.8 + 0.3 * len(points)))
    axes = figure.subplots()
    for (name, found), colour, marker in zip(points.items(), cycle(COLOURS), cycle("osv^DPX*h"), strict=False):
        axes.plot([x for x, _, _ in found], [y for _, y, _ in found], marker=marker, color=colour, label=name, lw=0.8)
        for x, y, word in found:
            axes.annotate(word, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7, color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return _png(figure)


def gantt(shown: Timeline) -> bytes:
    """Which node ran which blocks, epoch by epoch. Of more than 40 nodes those that were used longest."""
    used = _spans(shown)
    longest = sorted(used, key=lambda node: (-sum(end - begin for begin, end, _, _ in used[node]), node))
    nodes = sorted(longest[:NODES_SHOWN])
    figure = _figure(1.6 + 0.27 * max(4, len(nodes)))
    axes = figure.subplots()
    last = max((stage.last for epoch in shown.epochs for chain in epoch.placement for stage in chain), default=1)
    colours = _colours()
    for row, node in enumerate(nodes):
        for begin, end, first, final in used[node]:
            colour = colours((first + final) / 2 / max(1, last))
            axes.barh(row, end - begin, left=begin, height=0.8, color=colour, edgecolor="white", linewidth=0.5)
            label = f"{first}" if first == final else f"{first}-{final}"
            # A label as wide as its bar: about a ninetieth of the axis for each character.
            if (end - begin) / (shown.end_s - shown.begin_s) > len(label) / 90:
                dark = sum(colour[:3]) < 1.6
                ink = "white" if dark else "black"
                axes.text((begin + end) / 2, row, label, ha="center", va="center", fontsize=7, color=ink)
    for row, node in enumerate(nodes):
        own = (node, node.rpartition("-")[0])  # a node, and its site
        spans = active(shown, [spell for spell in shown.spells if spell.what in own])
        axes.broken_barh(spans, (row - 0.48, 0.96), facecolor="none", edgecolor=FAULT, hatch="////", lw=0.8, zorder=3)
    _shade(shown, (axes,), [spell for spell in shown.spells if spell.what in EVERYWHERE])
    axes.set_yticks(range(len(nodes)), nodes, fontsize=8)
    axes.set_ylim(len(nodes) - 0.4, -0.6)
    axes.set_xlim(shown.begin_s, shown.end_s)
    axes.set_xlabel("time (s). Numbers: blocks; dark: the first, yellow: the last. Hatched: a fault of the node")
    more = "" if len(used) <= NODES_SHOWN else f"; {NODES_SHOWN} of {len(used)} nodes"
    axes.set_title(f"{shown.policy}, seed {shown.seed}: blocks by node{more}", fontsize=11)
    return _png(figure)


def _spans(shown: Timeline) -> dict[str, list[tuple[float, float, int, int]]]:
    """By node, from when to when it ran which blocks; what stayed where it was is one span."""
    spans: dict[str, list[tuple[float, float, int, int]]] = {}
    for epoch in shown.epochs:
        begin, end = max(epoch.begin_s, shown.begin_s), min(epoch.end_s, shown.end_s)
        if begin >= end:
            continue
        for stage in (stage for chain in epoch.placement for stage in chain):
            rows = spans.setdefault(str(stage.node), [])
            same = next((i for i, row in enumerate(rows) if row[1:] == (begin, stage.first, stage.last)), None)
            if same is None:
                rows.append((begin, end, stage.first, stage.last))
            else:
                rows[same] = (rows[same][0], end, stage.first, stage.last)
    return spans


def _shade(shown: Timeline, axes: Sequence["Axes"], spells: Sequence[Spell]) -> None:
    """The times in which something was not as it should be, behind everything: the more at once, the darker."""
    for least in DARKER_AT:
        spans = active(shown, spells, least)
        for each in axes:
            where = each.get_xaxis_transform()
            each.broken_barh(spans, (0, 1), transform=where, color=FAULT, alpha=0.13, lw=0, zorder=0)


def active(shown: Timeline, spells: Sequence[Spell], least: int = 1) -> list[tuple[float, float]]:
    """Beginnings and lengths of the times in which at least so many of `spells` last; none too short to be seen."""
    shortest = (shown.end_s - shown.begin_s) / 600
    steps: list[tuple[float, int]] = []
    for spell in spells:
        begin = max(spell.begin_s, shown.begin_s)
        end = min(max(spell.end_s, begin + shortest), shown.end_s)
        if spell.end_s >= shown.begin_s and begin < end:
            steps += [(begin, 1), (end, -1)]
    spans: list[tuple[float, float]] = []
    count, since = 0, shown.begin_s
    # At one time what begins comes before what ends, so that one spell after the other is one span.
    for at_s, step in sorted(steps, key=lambda each: (each[0], -each[1])):
        before, count = count, count + step
        if before < least <= count:
            since = at_s
        elif count < least <= before and at_s > since:
            spans.append((since, at_s - since))
    return spans


def _number(axes: "Axes", epochs: Sequence[Epoch], begin_s: float, end_s: float) -> None:
    """A line where a plan came into force, with its epoch while there is room."""
    changes = [epoch for epoch, _ in actions(epochs) if begin_s <= epoch.begin_s <= end_s]
    for epoch in changes:
        axes.axvline(epoch.begin_s, color="black", linewidth=0.8, alpha=0.6)
    if len(changes) <= LABELS_SHOWN:
        for epoch in changes:
            axes.text(
                epoch.begin_s,
                1.01,
                str(epoch.epoch),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7,
            )


def _plain(axis: "Axis") -> None:
    """Numbers as people write them, at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _colours() -> "Colormap":
    from matplotlib import colormaps  # noqa: PLC0415 (part of the `dev` extra)

    return colormaps["viridis"]


def _figure(height: float) -> "Figure":
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    # A figure of its own, not pyplot's: nothing is kept, and no display is asked for.
    figure = Figure(figsize=(WIDTH, min(height, 14.0)), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: "Figure") -> bytes:
    written = BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
