"""`EntropyReport`, the result of `attention_entropy`: its table, its figure, and comparisons of several reports."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sfa_adapters.analysis.report import Report, Row, Skips, formula_of_means, interval_columns
from sfa_adapters.errors import DataError
from sfa_adapters.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EntropyReport", "compare_entropy", "entropy_change"]

DENSE, SPARSE = 0, 1


@dataclass(frozen=True, eq=False)
class EntropyReport(Report):
    """Attention entropy in dense and in sparse regions of images.

    Attributes:
        layers: Paths of the attention modules.
        nats: Mean entropy of the query patches of an image in nats, `[images, 2, layers, heads]`; dense comes first.
        relative: As `nats`, but H / log n.
        patches: Patches in the two regions, int `[images, 2]`.
        images: Numbers of the images that count, in the order in which the tower saw them.
        skipped: Images without dense or without sparse patches.
        normalize: Whether ratio, difference and figure use H / log n instead of nats.
        seed: Seed of the bootstrap.
        how: The other options.
    """

    layers: tuple[str, ...]
    nats: np.ndarray
    relative: np.ndarray
    patches: np.ndarray
    images: tuple[int, ...]
    skipped: Skips
    normalize: bool
    seed: int
    how: dict[str, Any]

    @property
    def values(self) -> np.ndarray:
        """Entropy in the unit of ratio, difference and figure, `[images, 2, layers, heads]`."""
        return self.relative if self.normalize else self.nats

    @property
    def unit(self) -> str:
        """Unit of `values`."""
        return "H / log n" if self.normalize else "nats"

    def mean(self, region: int, layer: int | None = None) -> Interval:
        """Mean over images of one region (0 dense, 1 sparse) in one layer or over all of them."""
        return bootstrap(_per_image(self.values[:, region], layer, None), self.seed)

    def ratio(self, layer: int | None = None, head: int | None = None) -> Interval:
        """Mean entropy of dense over sparse regions; 1 if attention is equally spread in both."""
        dense, sparse = (_per_image(self.values[:, region], layer, head) for region in (DENSE, SPARSE))
        return formula_of_means(np.divide, dense, sparse, seed=self.seed)

    def difference(self, layer: int | None = None, head: int | None = None) -> Interval:
        """Mean entropy of dense minus sparse regions."""
        return bootstrap(_per_image(self.values[:, DENSE] - self.values[:, SPARSE], layer, head), self.seed)

    def table(self) -> list[Row]:
        """The entropies over all layers, then of each layer, then of each head.

        Returns:
            Rows with `layer` and `head` (numbers or "all"), `images`, the means over images `dense_nats`,
            `sparse_nats`, `dense_relative`, `sparse_relative` (H / log n), and with 95% intervals `ratio` (dense over
            sparse) and `difference` (dense minus sparse), both in `unit`.
        """
        layers, heads = self.values.shape[2:]
        whole: list[tuple[int | None, int | None]] = [(None, None), *((layer, None) for layer in range(layers))]
        return [self._row(layer, head) for layer, head in (*whole, *itertools.product(range(layers), range(heads)))]

    def _row(self, layer: int | None, head: int | None) -> Row:
        row: Row = {"layer": "all" if layer is None else layer, "head": "all" if head is None else head}
        row["images"] = len(self.images)
        for unit, values in (("nats", self.nats), ("relative", self.relative)):
            for name, region in (("dense", DENSE), ("sparse", SPARSE)):
                row[f"{name}_{unit}"] = float(_per_image(values[:, region], layer, head).mean())
        row |= interval_columns("ratio", self.ratio(layer, head))
        row |= interval_columns("difference", self.difference(layer, head))
        return row | {"unit": self.unit}

    def options(self) -> dict[str, Any]:
        """The options of the measurement, and the share of patches that are dense."""
        share = self.patches.sum(0) / self.patches.sum()
        option_values = {"normalize": self.normalize, "seed": self.seed, "layers": list(self.layers)}
        return self.how | option_values | {"dense_share_of_patches": float(share[DENSE])}

    def figure(self) -> Figure:
        """Violins of all images and heads for up to six layers, and the mean of each layer with its interval."""
        from sfa_adapters.analysis.entropy_figure import plot_entropy

        return plot_entropy({"": self})


def _per_image(values: np.ndarray, layer: int | None, head: int | None) -> np.ndarray:
    """`[images, layers, heads]` to one number per image."""
    values = values if layer is None else values[:, [layer]]
    values = values if head is None else values[:, :, [head]]
    return values.mean((1, 2), dtype=np.float64)


def entropy_change(before: EntropyReport, after: EntropyReport, seed: int = 0) -> list[Row]:
    """Change of the entropy from one model to another on the same images.

    Args:
        before: Report of the first model.
        after: Report of the second model.
        seed: Seed of the bootstrap.

    Returns:
        A row for all layers together and one for each layer: `layer`, `images`, and after minus before with 95%
        intervals (paired bootstrap over images): `dense`, `sparse` (in `unit`) and `ratio`.

    Raises:
        DataError: The two differ in images, regions, layers or units.
    """
    same = before.images == after.images and np.array_equal(before.patches, after.patches)
    if not same or before.values.shape != after.values.shape or before.normalize != after.normalize:
        raise DataError("A change needs two reports over the same images, regions, layers and unit.")

    def ratios(dense: Any, sparse: Any, dense_after: Any, sparse_after: Any) -> Any:
        return dense_after / sparse_after - dense / sparse

    rows: list[Row] = []
    for layer in (None, *range(before.values.shape[2])):
        means = [_per_image(r.values[:, region], layer, None) for r in (before, after) for region in (DENSE, SPARSE)]
        row: Row = {"layer": "all" if layer is None else layer, "images": len(before.images)}
        row |= interval_columns("dense", bootstrap(means[2] - means[0], seed))
        row |= interval_columns("sparse", bootstrap(means[3] - means[1], seed))
        row |= interval_columns("ratio", formula_of_means(ratios, *means, seed=seed))
        rows.append(row | {"unit": before.unit})
    return rows


def compare_entropy(reports: Mapping[str, EntropyReport]) -> Figure:
    """Draws several reports, for instance before and after training, on common scales.

    Args:
        reports: The names stand above the panels.

    Returns:
        Violins of every report, and a panel with the ratio of each layer.

    Raises:
        DataError: There is no report, or they have different units.
    """
    from sfa_adapters.analysis.entropy_figure import plot_entropy

    if not reports or len({report.normalize for report in reports.values()}) > 1:
        raise DataError("Give at least one report, all in nats or all in H / log n.")
    return plot_entropy(reports)
