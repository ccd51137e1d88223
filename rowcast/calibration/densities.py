"""How many neurons each layer keeps where the layers keep a given share on average."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise


def water_fill(grid: Sequence[float], lost: Sequence[Sequence[float]], mean: float) -> list[float]:
    """The density of each layer, `mean` on average, at which all lose equally much by keeping a little less.

    `grid`: densities, ascending, the last 1. `lost` [L][G]: the share of each layer's output that is lost at each. Between the
    points of its lower convex hull, from (0, 1) on, a curve is taken to be straight; the steepest pieces of all layers are kept.
    """
    pieces = [
        ((y0 - y1) / (x1 - x0), x1 - x0, layer)
        for layer, curve in enumerate(lost)
        for (x0, y0), (x1, y1) in _segments(_hull([(0.0, 1.0), *zip(grid, curve, strict=True)]))
    ]
    left, densities = mean * len(lost), [0.0] * len(lost)
    for _, alike in groupby(sorted(pieces, reverse=True), key=lambda piece: piece[0]):
        widths = [(width, layer) for _, width, layer in alike]
        total = sum(width for width, _ in widths)
        share = min(1.0, left / total)
        for width, layer in widths:
            densities[layer] += share * width
        left -= share * total
    return [min(1.0, density) for density in densities]


Point = tuple[float, float]


def _hull(points: list[Point]) -> list[Point]:
    """The lower convex hull of points in ascending order."""
    hull: list[Point] = []
    for x, y in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _above(first: Point, middle: Point, last: Point) -> bool:
    """Whether `middle` lies on or above the line from `first` to `last`."""
    (x0, y0), (x1, y1), (x2, y2) = first, middle, last
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)


def _segments(points: list[Point]) -> list[tuple[Point, Point]]:
    return list(pairwise(points))
