"""Density maps of a picture by name: the estimator, edge labels, a blurred Canny filter, an OCR engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sfa_adapters.adat.density import DensityEstimator
from sfa_adapters.adat.labels import CELL, SPREAD, density_labels

__all__ = ["MapScorer", "canny_map", "estimator_map", "map_scorers"]

MapScorer = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] -> [ceil(H / 16), ceil(W / 16)]
GAIN = 4.0  # of blurred edges: in print, edges are about a quarter of the pixels


def estimator_map(weights: str | Path | None = None) -> MapScorer:
    """The density estimator.

    Args:
        weights: As `DensityEstimator.pretrained` takes them.
    """
    model = DensityEstimator.pretrained(weights).fused()

    def run(picture: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)[0].numpy()

    return run


def canny_map(picture: np.ndarray) -> np.ndarray:
    """Canny edges (100, 200), blurred like edge labels: what people use who have no estimator."""
    import cv2

    edges = cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 100, 200).astype(np.float32) / 255
    full = np.minimum(cv2.GaussianBlur(edges, (0, 0), SPREAD) * GAIN, 1.0)
    rows, columns = (-(-side // CELL) for side in picture.shape[:2])
    padded = np.pad(full, ((0, rows * CELL - len(full)), (0, columns * CELL - full.shape[1])), mode="edge")
    return padded.reshape(rows, CELL, columns, CELL).mean(axis=(1, 3))


def _grid(picture: np.ndarray) -> tuple[int, int]:
    rows, columns = (-(-side // CELL) for side in picture.shape[:2])
    return rows, columns


def map_scorers(weights: dict[str, str | Path | None]) -> dict[str, MapScorer]:
    """The scorers of the tables of docs/density.md.

    Args:
        weights: Name in the table, and weights of the estimator.
    """
    estimators = {name: estimator_map(path) for name, path in weights.items()}
    return {
        **estimators,
        "edge labels": lambda picture: density_labels(picture, _grid(picture), "edges"),
        "Canny, blurred": canny_map,
    }
