"""Plots of a comparison: losses with intervals, losses against sizes, slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What `fathom.comparison.weigh` returns, with its provenance.
Figures = Mapping[str, Any]

#: A point further out than so many times the median distance leaves the plot to the others.
_FAR = 5.0
#: Per cent of the reference's loss at which the heat map's colours end.
_HOTTEST = 10.0


def ranked(figures: Figures) -> dict[str, Any]:
    """Models and baselines, best loss first; those without one come last."""
    both = figures["models"] | figures["baselines"]

    def loss(name: str) -> float:
        mean = both[name]["mean"]
        value = mean and mean[figures["loss"]]
        return float("inf") if value is None else float(value)

    return {name: both[name] for name in sorted(both, key=loss)}


def plot_differences(figures: Figures) -> Any:
    """Each model's loss against the reference's, with its interval."""
    import plotly.graph_objects as go

    loss = figures["loss"]
    found = {
        name: model["against"][loss]
        for name, model in ranked(figures).items()
        if model["against"] and model["against"][loss]
    }
    names = list(found)[::-1]
    values = [found[name]["difference"] for name in names]
    figure = go.Figure()
    figure.add_scatter(
        x=values,
        y=names,
        mode="markers",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [found[n]["hi"] - found[n]["difference"] for n in names],
            "arrayminus": [found[n]["difference"] - found[n]["lo"] for n in names],
        },
    )
    figure.add_vline(x=0, line_width=1)
    title = f"{loss} minus that of {figures['reference']}; left is better"
    bound = _bound(values)
    if beyond := [name for name, v in zip(names, values, strict=True) if abs(v) > bound]:
        near = [v for n in names if n not in beyond for v in found[n].values()]
        figure.update_xaxes(range=[min(0, *near) * 1.1, max(0, *near) * 1.1])
        title += f" (beyond the edge: {', '.join(beyond)})"
    return _plain(figure, title, 90 + 28 * len(names))


def plot_sizes(figures: Figures) -> Any:
    """Mean loss against the number of parameters, with its spread over seeds."""
    import plotly.graph_objects as go

    loss = figures["loss"]
    models = {n: m for n, m in figures["models"].items() if m["mean"]}
    figure = go.Figure()
    for name, model in models.items():
        figure.add_scatter(
            x=[model["cost"]["parameters"]],
            y=[model["mean"][loss]],
            error_y={"type": "data", "array": [model["spread"][loss] or 0]},
            mode="markers",
            name=name,
        )
    title = f"{loss} on the test window against size, with its spread over seeds"
    losses = [model["mean"][loss] for model in models.values()]
    bound = _bound([value - min(losses) for value in losses])
    if beyond := [n for n, m in models.items() if m["mean"][loss] - min(losses) > bound]:
        figure.update_yaxes(range=[min(losses) - bound / 10, min(losses) + bound])
        title += f" (beyond the edge: {', '.join(beyond)})"
    figure.update_xaxes(type="log", title="parameters")
    figure.update_yaxes(title=loss)
    return _plain(figure, title, 420).update_layout(showlegend=True)


def plot_slices(figures: Figures) -> Any:
    """How much higher each model's loss is than the reference's, by slice."""
    import plotly.graph_objects as go

    loss, cut = figures["loss"], figures["slices"]
    names = [name for name in cut["rows"] if name not in cut["left_out"]]
    models = {n: m for n, m in ranked(figures).items() if m["mean"]}
    base = figures["models"][figures["reference"]]
    if not base["mean"]:
        return _plain(go.Figure(), f"{figures['reference']} could not be trained", 120)

    def excess(model: Any, part: str | None) -> float:
        sides = [side if part is None else side["slices"][part] for side in (model, base)]
        return 100 * float(sides[0]["mean"][loss] / sides[1]["mean"][loss] - 1)

    values = [[excess(model, part) for part in (None, *names)] for model in models.values()]
    figure = go.Figure()
    figure.add_heatmap(
        z=values[::-1],
        x=["all", *names],
        y=list(models)[::-1],
        zmin=-_HOTTEST,
        zmax=_HOTTEST,
        colorscale="RdBu_r",
        text=[[f"{value:+.1f}" for value in row] for row in values[::-1]],
        texttemplate="%{text}",
        colorbar={"title": "%"},
    )
    title = f"{loss}: per cent above that of {figures['reference']}"
    return _plain(figure, title, 120 + 28 * len(models))


def _bound(distances: Sequence[float]) -> float:
    """How far from 0 a plot reaches, so that a few far points do not flatten all others."""
    ordered = sorted(map(abs, distances))
    return _FAR * ordered[len(ordered) // 2] if ordered else 0.0


def _plain(figure: Any, title: str, height: int) -> Any:
    return figure.update_layout(
        title=title,
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(128,128,128,0.08)",
        font={"color": "#7a8594"},  # to be read on light and dark
        margin={"l": 10, "r": 10, "t": 50, "b": 40},
        showlegend=False,
    )
