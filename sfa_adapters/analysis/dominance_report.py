"""The formulas of MDI and AEI, their averages over samples, and their figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sfa_adapters.analysis.prompts import IMAGE, TEXT
from sfa_adapters.analysis.report import (
    COLOURS,
    LABEL,
    MARKERS,
    Report,
    Row,
    Skips,
    around,
    formula_of_means,
    interval_columns,
    new_figure,
    plain,
)
from sfa_adapters.figure_style import GRAY
from sfa_adapters.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DominanceReport", "attention_efficiency", "dominance_index"]

Number = np.ndarray | float


def dominance_index(mass_text: Number, mass_other: Number, num_text: Number, num_other: Number) -> Any:
    """Modality dominance index (MDI), equation 1 of arXiv 2508.10552.

    Args:
        mass_text: A_T, attention on text tokens, in any unit.
        mass_other: A_O, attention on the other tokens in the same unit, above 0.
        num_text: |T|, at least 1.
        num_other: |O|, at least 1.

    Returns:
        Attention of a text token over attention of another token.
    """
    return (mass_text / num_text) / (mass_other / num_other)


def attention_efficiency(mass: Number, mass_others: Number, num: Number, num_others: Number) -> Any:
    """Attention efficiency index (AEI) of a modality, equations 2 to 4 of arXiv 2508.10552.

    Args:
        mass: Attention on its tokens, in any unit.
        mass_others: Attention on all other tokens in the same unit.
        num: How many tokens it has, at least 1.
        num_others: How many others there are.

    Returns:
        Its share of the attention over its share of the tokens.
    """
    return (mass / (mass + mass_others)) / (num / (num + num_others))


@dataclass(frozen=True, eq=False)
class DominanceReport(Report):
    """Text dominance of a language model, stage by stage.

    Attributes:
        stages: Numbers of the layers of each stage.
        mass: Mean attention of a query on all text and on all non-text tokens of a prompt, `[samples, stages, 2]`.
        tokens: Text and non-text tokens of each prompt, int `[samples, 2]`.
        queries: Query rows of each sample, int `[samples]`.
        samples: Numbers of the samples that count.
        skipped: The other samples, with reasons.
        seed: Seed of the bootstrap.
        how: The options of the measurement.
    """

    stages: dict[str, tuple[int, ...]]
    mass: np.ndarray
    tokens: np.ndarray
    queries: np.ndarray
    samples: tuple[int, ...]
    skipped: Skips
    seed: int
    how: dict[str, Any]

    def per_sample(self, stage: str) -> dict[str, np.ndarray]:
        """`mdi`, `aei_text` and `aei_image` of every sample in one stage, `[samples]` each."""
        text, other = self.mass[:, list(self.stages).index(stage)].T
        num_text, num_other = self.tokens.T
        return {
            "mdi": dominance_index(text, other, num_text, num_other),
            "aei_text": attention_efficiency(text, other, num_text, num_other),
            "aei_image": attention_efficiency(other, text, num_other, num_text),
        }

    def mean_of_ratios(self, stage: str) -> dict[str, Interval]:
        """Means over samples of `per_sample`. The identities of MDI and AEI hold per sample, not for these means."""
        return {name: bootstrap(values, self.seed) for name, values in self.per_sample(stage).items()}

    def ratio_of_means(self, stage: str) -> dict[str, Interval]:
        """MDI and AEI of the means over samples of A_T, A_O, |T| and |O|, for which their identities hold."""
        text, other = self.mass[:, list(self.stages).index(stage)].T
        num_text, num_other = self.tokens.T
        formulas: dict[str, tuple[Any, ...]] = {
            "mdi": (dominance_index, text, other, num_text, num_other),
            "aei_text": (attention_efficiency, text, other, num_text, num_other),
            "aei_image": (attention_efficiency, other, text, num_other, num_text),
        }
        return {name: formula_of_means(*formula, seed=self.seed) for name, formula in formulas.items()}

    def table(self) -> list[Row]:
        """One row per stage and way of averaging.

        Returns:
            Rows with `stage`, `layers`, `average` ("mean of ratios" or "ratio of means"), with 95% intervals `mdi`,
            `aei_text` and `aei_image`, and the means over samples `text_mass`, `image_mass` (attention of one query),
            `text_tokens`, `image_tokens`, `samples`.
        """
        rows: list[Row] = []
        for number, (stage, layers) in enumerate(self.stages.items()):
            for average, measure in (
                ("mean of ratios", self.mean_of_ratios(stage)),
                ("ratio of means", self.ratio_of_means(stage)),
            ):
                row: Row = {"stage": stage, "layers": " ".join(map(str, layers)), "average": average}
                for name, interval in measure.items():
                    row |= interval_columns(name, interval)
                for name, values in (("mass", self.mass[:, number]), ("tokens", self.tokens)):
                    row |= {
                        f"{kind}_{name}": float(values[:, g].mean()) for kind, g in (("text", TEXT), ("image", IMAGE))
                    }
                rows.append(row | {"samples": len(self.samples)})
        return rows

    def options(self) -> dict[str, Any]:
        """The options of the measurement."""
        return self.how | {"seed": self.seed, "stages": {name: list(layers) for name, layers in self.stages.items()}}

    def figure(self) -> Figure:
        """MDI and AEI of the text by stage: every sample, both averages, and their intervals."""
        return plot_dominance(self)


def plot_dominance(report: DominanceReport) -> Figure:
    """Draws MDI and AEI of the text by stage: a dot per sample, both averages with their intervals.

    Args:
        report: What to draw.
    """
    figure = new_figure(12.0, 6.4)
    panels: Any = figure.subplots(1, 2)
    stages = list(report.stages)
    rng = np.random.default_rng(0)
    titles = {
        "mdi": "MDI: a text token's attention\nover an image token's",
        "aei_text": "AEI: text's share of attention\nover its share of tokens",
    }
    for axis, (name, title) in zip(panels, titles.items(), strict=True):
        plain(axis, title, y="ratio, log scale")
        axis.axhline(1.0, color=GRAY, linewidth=1.6, linestyle="--", label="1: no preference")
        for place, stage in enumerate(stages):
            values = report.per_sample(stage)[name]
            spread = rng.uniform(-0.1, 0.1, len(values))
            label = f"a sample (n = {len(values)})" if place == 0 else None
            axis.plot(place - 0.12 + spread, values, ".", color="#aaaaaa", markersize=8, label=label)
        averages = {"mean of ratios": report.mean_of_ratios, "ratio of means": report.ratio_of_means}
        for number, (label, average) in enumerate(averages.items()):
            intervals = [average(stage)[name] for stage in stages]
            axis.errorbar(
                np.arange(len(stages)) + 0.12 + 0.16 * number, [i.value for i in intervals], around(intervals),
                color=COLOURS[number], fmt=MARKERS[number], markersize=10, capsize=5, elinewidth=2.2,
                label=f"{label}, 95% interval",
            )  # fmt: skip
        axis.set_yscale("log")
        _log_ticks(axis)
        axis.set_xticks(
            range(len(stages)), [_stage_label(stage, report.stages[stage]) for stage in stages], fontsize=LABEL - 1
        )
        axis.set_xlim(-0.35, len(stages) - 0.4)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=LABEL, frameon=False)
    return figure


def _stage_label(stage: str, layers: tuple[int, ...]) -> str:
    near = layers == tuple(range(layers[0], layers[-1] + 1))
    listed = f"{layers[0]}-{layers[-1]}" if near and len(layers) > 2 else ", ".join(map(str, layers))
    return f"{stage}\nlayers {listed}"


def _log_ticks(axis: Any) -> None:
    """Plain numbers as ticks of a log axis, also where it covers less than a power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_ylim()
    low, high = min(low, 0.45), max(high, 2.2)  # so that there are always three numbers
    axis.set_ylim(low, high)
    steps = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
