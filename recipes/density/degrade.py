"""What happens to print before a model sees it: coloured and faint ink, dark mode, shadow, blur, noise, JPEG, scanners.

All effects keep places: truth from word boxes stays right. Each takes and returns uint8 `[H, W, 3]`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = [
    "EFFECTS_THAT_KEEP_PLACES",
    "blurred",
    "faded",
    "jpeg",
    "noisy",
    "photographed",
    "random_effects",
    "recoloured",
    "shaded",
]

# Ink and paper that people print and that edge detectors on gray levels like or dislike.
PAIRS = (
    ((200, 0, 0), (255, 235, 60)), ((255, 255, 255), (200, 30, 30)), ((0, 60, 160), (255, 255, 255)),
    ((255, 220, 0), (20, 40, 120)), ((0, 110, 50), (235, 245, 220)), ((120, 60, 0), (245, 225, 190)),
    ((255, 255, 255), (0, 130, 90)), ((150, 150, 150), (40, 40, 40)),
)  # fmt: skip


def recoloured(picture: np.ndarray, ink: tuple[int, ...], paper: tuple[int, ...]) -> np.ndarray:
    """Prints a page in two colours: black becomes `ink`, white becomes `paper`, and grays lie between."""
    share = picture.astype(np.float32).mean(axis=2, keepdims=True) / 255
    low, high = np.asarray(ink, np.float32), np.asarray(paper, np.float32)
    return (low + (high - low) * share).round().astype(np.uint8)


def faded(picture: np.ndarray, contrast: float, light: float) -> np.ndarray:
    """Multiplies the contrast around middle gray, and adds light (gray levels)."""
    return np.clip((picture.astype(np.float32) - 128) * contrast + 128 + light, 0, 255).astype(np.uint8)


def shaded(picture: np.ndarray, rng: np.random.Generator, depth: float) -> np.ndarray:
    """Uneven light: a slope over the page, and one soft-edged shadow; at most `depth` of the light is lost."""
    import cv2

    height, width = picture.shape[:2]
    y, x = np.mgrid[0:1:16j, 0:1:16j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)
    edge = rng.uniform(-0.4, 0.4)
    turn = rng.uniform(0, 2 * np.pi)
    distance = (x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn) - edge
    shadow = 1 / (1 + np.exp(-distance * rng.uniform(8, 60)))
    light = 1 - depth * (rng.uniform(0, 0.6) * slope + rng.uniform(0, 0.6) * shadow).clip(0, 1)
    field = cv2.resize(light.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return (picture * field[..., None]).astype(np.uint8)


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with a standard deviation in px."""
    import cv2

    return cv2.GaussianBlur(picture, (0, 0), sigma)


def noisy(picture: np.ndarray, rng: np.random.Generator, sigma: float, coloured: bool = True) -> np.ndarray:
    """Gaussian noise with a standard deviation in gray levels."""
    noise = rng.standard_normal((*picture.shape[:2], 3 if coloured else 1), dtype=np.float32) * sigma
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """Encodes as JPEG and decodes again."""
    import cv2

    encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded


def photographed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The light and the camera of a photograph of a page: shadow, warm or cold light, blur, noise, JPEG."""
    tint = rng.uniform(0.82, 1.0, 3).astype(np.float32)
    picture = (shaded(picture, rng, rng.uniform(0.2, 0.6)) * tint).astype(np.uint8)
    picture = noisy(blurred(picture, rng.uniform(0.4, 0.9)), rng, rng.uniform(1, 7))
    return jpeg(picture, int(rng.integers(50, 90)))


def _pair(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper that differ by at least 45 levels in one channel; a third of them are faint."""
    if rng.random() < 0.25:
        return PAIRS[int(rng.integers(len(PAIRS)))]
    if rng.random() < 0.45:  # faint: gray on nearly white, or on any light paper
        paper = np.clip(rng.uniform(190, 255) + rng.normal(0, 8, 3), 0, 255)
        ink = np.clip(paper - rng.uniform(45, 90) + rng.normal(0, 5, 3), 0, 255)
        return tuple(map(int, ink)), tuple(map(int, paper))
    while True:
        ink, paper = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
        if rng.random() < 0.6:
            paper = rng.integers(170, 256, 3)
        if np.abs(ink - paper).max() >= 70:
            return tuple(map(int, ink)), tuple(map(int, paper))


def random_effects(picture: np.ndarray, rng: np.random.Generator, fine: bool) -> np.ndarray:
    """Draws some effects at random, as pages for training have them.

    Args:
        picture: uint8 `[H, W, 3]`.
        rng: Draws them.
        fine: The print is so small that blur would make it unreadable.
    """
    pick = rng.random
    if pick() < 0.3:
        picture = recoloured(picture, *_pair(rng))
    elif pick() < 0.15:
        picture = 255 - picture
    if pick() < 0.3:
        picture = faded(picture, rng.uniform(0.45, 1.15), rng.uniform(-40, 40))
    if pick() < 0.12:
        return photographed(picture, rng)
    if pick() < 0.2:
        picture = shaded(picture, rng, rng.uniform(0.1, 0.6))
    if pick() < 0.2:
        picture = blurred(picture, rng.uniform(0.3, 0.6) if fine else rng.uniform(0.4, 1.6))
    if pick() < 0.25:
        picture = noisy(picture, rng, rng.uniform(1, 6) if pick() < 0.6 else rng.uniform(6, 25), pick() < 0.5)
    if pick() < 0.3:
        picture = jpeg(picture, int(rng.integers(25, 92)))
    if pick() < 0.04:  # a scan in black and white
        picture = np.where(picture.mean(axis=2, keepdims=True) > rng.uniform(100, 170), 255, 0).repeat(3, 2)
    if pick() < 0.1:
        picture = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
    return np.ascontiguousarray(picture.astype(np.uint8))


# Each effect alone, in a usual strength: for tests and figures.
EFFECTS_THAT_KEEP_PLACES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "red on yellow": lambda p, r: recoloured(p, *PAIRS[0]),
    "faded": lambda p, r: faded(p, 0.5, 20.0),
    "shadow": lambda p, r: shaded(p, r, 0.5),
    "blur": lambda p, r: blurred(p, 1.0),
    "noise": lambda p, r: noisy(p, r, 10.0),
    "JPEG": lambda p, r: jpeg(p, 40),
    "photograph": photographed,
}
