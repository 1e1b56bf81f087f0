"""The spiral: decision surfaces and hidden states, the paper's Figures 1 and 2."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.report.figures.style import Figure, Plot, array, axis, scatter, square
from manifold_mixup.lab.report.pictures import CLASS_COLOURS, SURFACE_COLOURS, Pictures

__all__ = ["hidden_figure", "spiral_plots", "surface_figure"]


def spiral_plots(label: str, index: int, pictures: Pictures) -> list[Plot]:
    """The two pictures of one method.

    Args:
        label: The method's label.
        index: Its place, for the names of the figures.
        pictures: From :func:`~manifold_mixup.lab.report.pictures.read_pictures`.
    """
    unsure = 100 * float(((pictures.surface > 0.1) & (pictures.surface < 0.9)).mean())
    spread = ", ".join(
        f"{name} {_spread(pictures.train_hidden[pictures.train_y == c])}" for c, name in enumerate(("red", "blue"))
    )
    return [
        Plot(
            f"surface-{index}",
            f"Decision surface in input space: {label}",
            _of_method(index, surface_figure(pictures)),
            f"{unsure:.0f} % of the square have a probability between 0.1 and 0.9.",
        ),
        Plot(
            f"hidden-{index}",
            f"Hidden states: {label}",
            _of_method(index, hidden_figure(pictures)),
            f"Root mean square distance of the training points' hidden states from the mean of their class: {spread}.",
        ),
    ]


def _spread(points: npt.NDArray[np.floating]) -> str:
    """Root mean square distance from their mean; points of a diverged network are left out."""
    finite = points[np.isfinite(points).all(axis=1)].astype(np.float64)
    if not len(finite):
        return "without a finite number"
    return f"{np.sqrt(((finite - finite.mean(axis=0)) ** 2).sum(axis=1).mean()):.2f}"


def _of_method(index: int, figure: Figure) -> Figure:
    """The same figure, all of whose traces the page's legend shows and hides with the method."""
    return {**figure, "data": [{**trace, "legendgroup": f"method-{index}"} for trace in figure["data"]]}


def surface_figure(pictures: Pictures) -> Figure:
    """The decision surface in input space, with the training points."""
    left, right, bottom, top = (float(edge) for edge in pictures.extent)
    height, width = pictures.surface.shape
    percent = np.rint(100 * np.nan_to_num(pictures.surface.astype(np.float64), nan=0.5)).clip(0, 100).astype(np.uint8)
    cell = ((right - left) / width, (top - bottom) / height)
    surface = {
        "type": "heatmap",
        "z": array(percent),
        "x0": left + cell[0] / 2,
        "dx": cell[0],
        "y0": bottom + cell[1] / 2,
        "dy": cell[1],
        "zmin": 0,
        "zmax": 100,
        "zsmooth": "fast",
        "colorscale": [[stop, f"rgb{colour}"] for stop, colour in SURFACE_COLOURS],
        "showscale": False,
        "hovertemplate": "(%{x:.1f}, %{y:.1f}): %{z} % blue<extra></extra>",
    }
    frame = square(
        {**axis(), "range": [left, right], "constrain": "domain"},
        {**axis(), "range": [bottom, top], "scaleanchor": "x", "constrain": "domain"},
    )
    return {"data": [surface, *_classes(pictures.train_x, pictures.train_y)], "layout": frame}


def hidden_figure(pictures: Pictures) -> Figure:
    """The bottleneck's outputs: of inputs drawn uniformly from the square, and above them of the training points."""
    uniform = scatter(
        x=array(pictures.uniform_hidden[:, 0]),
        y=array(pictures.uniform_hidden[:, 1]),
        name="uniform inputs",
        marker={"size": 3, "color": "var(--ink)", "opacity": 0.5},
        text=[f"{100 * top:.0f} %" for top in pictures.uniform_top.tolist()],
        hovertemplate="uniform input, top probability %{text}<extra></extra>",
    )
    frame = square(axis(), axis())
    return {"data": [uniform, *_classes(pictures.train_hidden, pictures.train_y)], "layout": frame}


def _classes(points: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> list[Figure]:
    traces = []
    for label, (colour, name) in enumerate(zip(CLASS_COLOURS, ("red", "blue"), strict=True)):
        chosen = points[labels == label]
        traces.append(
            scatter(
                x=array(chosen[:, 0]),
                y=array(chosen[:, 1]),
                name=f"class {name}",
                marker={"size": 6, "color": colour, "line": {"width": 0.7, "color": "#ffffff"}},
                hovertemplate=f"{name} training point<extra></extra>",
            )
        )
    return traces
