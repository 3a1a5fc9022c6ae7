"""Parts of pages that are not text: paper, scanner and JPEG artefacts, photographs, line art and hatching."""

import io
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from sfa_adapters.recipes.synthetic.tables import Split

__all__ = ["PHOTOGRAPHS", "Colour", "Rect", "artefacts", "blank_paper", "line_art", "photograph"]

Colour = tuple[int, ...]
Rect = tuple[float, float, float, float]  # left, top, right, bottom
# Photographs of scikit-image without readable text.
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut", "brick", "camera", "cell", "coins", "grass", "horse", "hubble_deep_field", "immunohistochemistry",
        "microaneurysms", "moon",
    ),
    "test": ("chelsea", "coffee", "gravel", "motorcycle", "retina", "rocket"),
}  # fmt: skip
PHOTOGRAPHS["val"] = PHOTOGRAPHS["train"]


@cache
def _photo(name: str) -> np.ndarray:
    import skimage.data

    image = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    return np.ascontiguousarray(np.stack([image] * 3, axis=-1) if image.ndim == 2 else image[..., :3])


def photograph(rng: np.random.Generator, split: Split, height: int, width: int, textures: float = 0.2) -> np.ndarray:
    """A crop of a photograph, or with probability `textures` a random texture, uint8 `[height, width, 3]`."""
    if rng.random() < textures:
        picture = _texture(rng, height, width)
    else:
        names = PHOTOGRAPHS[split]
        whole = _photo(names[int(rng.integers(len(names)))])
        side = min(whole.shape[:2]) * float(rng.uniform(0.25, 1.0))
        h, w = (round(side * min(1, height / width)), round(side * min(1, width / height)))
        y, x = (int(rng.integers(0, whole.shape[0] - h + 1)), int(rng.integers(0, whole.shape[1] - w + 1)))
        piece = Image.fromarray(whole[y : y + max(h, 1), x : x + max(w, 1)])
        picture = np.asarray(piece.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    contrast, light = float(rng.uniform(0.6, 1.2)), float(rng.uniform(-30, 30))
    return np.clip((picture - 128) * contrast + 128 + light, 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of a random spectrum, from clouds to gravel."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(height, width)
    spectrum = np.fft.rfft2(rng.normal(size=(height, width))) * frequency ** -float(rng.uniform(0.6, 2.0))
    field = np.fft.irfft2(spectrum, (height, width))
    field = (field - field.mean()) / field.std()
    colour = rng.uniform(40, 215, 3) + field[..., None] * rng.uniform(10, 60, 3)
    return colour.astype(np.float32)


def blank_paper(rng: np.random.Generator, height: int, width: int, paper: Colour) -> np.ndarray:
    """An empty scanned sheet: uneven light, a dark border, folds, specks and dust, uint8 `[height, width, 3]`."""
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    light = 1.0 - float(rng.uniform(0, 0.15)) * (x**2 + y**2) - float(rng.uniform(-0.08, 0.08)) * (x + y)
    if rng.random() < 0.3:  # the shadow of the lid
        light = light * (1 - float(rng.uniform(0.2, 0.7)) * np.exp((np.abs(x) - 1) * float(rng.uniform(20, 80))))
    image = Image.fromarray(np.clip(np.array(paper) * light[..., None], 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.3:
        place, shade = float(rng.uniform(0.2, 0.8)), tuple(max(0, int(p - rng.uniform(10, 60))) for p in paper)
        line = (0, place * height, width, place * height + float(rng.uniform(-4, 4)))
        draw.line(line if rng.random() < 0.5 else (line[1], 0, line[3], height), shade, int(rng.integers(1, 3)))
    for _ in range(int(rng.choice([0, 0, 5, 30, 100]))):
        px, py, r = float(rng.uniform(0, width)), float(rng.uniform(0, height)), float(rng.exponential(0.9))
        draw.ellipse((px - r, py - r, px + r, py + r), fill=tuple(int(p * rng.uniform(0, 0.8)) for p in paper))
    return np.asarray(image)


def line_art(rng: np.random.Generator, height: int, width: int, paper: Colour, ink: Colour) -> np.ndarray:
    """Grids, hatching, checkerboards, frames, curves, dots or shapes, no text, uint8 `[height, width, 3]`."""
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    what = str(rng.choice(["grid", "hatching", "checkers", "shapes", "curves", "dots", "bars"]))
    step, weight = float(np.exp(rng.uniform(np.log(3), np.log(50)))), int(rng.integers(1, 4))
    if what in ("grid", "hatching", "bars"):
        angle = 0.0 if what == "grid" else np.pi / 2 if what == "bars" else float(rng.uniform(0, np.pi))
        turns = (angle, angle + np.pi / 2) if what == "grid" or rng.random() < 0.3 else (angle,)
        reach = height + width
        for turn in turns:
            c, s = np.cos(turn), np.sin(turn)
            for k in np.arange(-reach, reach, max(step, weight + 2.0)):
                if what == "bars" and rng.random() < 0.4:  # a bar code
                    continue
                x, y = width / 2 - s * k, height / 2 + c * k
                draw.line((x - c * reach, y - s * reach, x + c * reach, y + s * reach), ink, weight)
    elif what == "checkers":
        ys, xs = np.mgrid[:height, :width]
        image.paste(ink, mask=Image.fromarray((((ys // step + xs // step) % 2) * 255).astype(np.uint8)))
    elif what == "dots":
        for y in np.arange(step / 2, height, max(step, 4)):
            for x in np.arange(step / 2, width, max(step, 4)):
                draw.ellipse((x - weight, y - weight, x + weight, y + weight), fill=ink)
    else:
        for _ in range(int(rng.integers(2, 16))):
            xs, ys = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
            box, fill = (xs[0], ys[0], xs[1], ys[1]), tuple(int(v) for v in rng.integers(0, 256, 3))
            if what == "curves":
                t = np.linspace(0, 1, 60)
                wave = ys[0] + (ys[1] - ys[0]) * (0.5 + 0.5 * np.sin(t * rng.uniform(2, 25) + rng.uniform(0, 6)))
                draw.line([(float(u * width), float(v)) for u, v in zip(t, wave, strict=True)], fill, weight)
            elif rng.random() < 0.5:
                draw.rectangle(box, fill if rng.random() < 0.4 else None, ink, weight)
            else:
                draw.ellipse(box, fill if rng.random() < 0.4 else None, ink, weight)
    return np.asarray(image)


def artefacts(
    rng: np.random.Generator, image: np.ndarray, boxes: np.ndarray, paper: Colour, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Adds artefacts of a scan: rotation by up to 1 degree, blur, noise, specks, JPEG compression.

    Args:
        rng: random generator.
        image: uint8 `[H, W, 3]`.
        boxes: `[n, 4]`, left, top, right, bottom in px.
        paper: colour of the corners that the rotation uncovers.
        strength: from 0 (no change) to 1.

    Returns:
        The image, and the axis-aligned boxes around the rotated ones.
    """
    if strength == 0.0:
        return image.copy(), boxes
    picture = Image.fromarray(image)
    if rng.random() < 0.5:
        degrees = float(rng.uniform(-1, 1)) * strength
        picture = picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=paper)
        boxes = _turned(boxes, degrees, picture.width / 2, picture.height / 2)
    pixels = np.asarray(picture).astype(np.float32)
    if rng.random() < 0.4:
        import cv2

        pixels = cv2.GaussianBlur(pixels, (0, 0), float(rng.uniform(0.3, 0.3 + 0.5 * strength)))
    if rng.random() < 0.6:
        pixels = pixels + rng.normal(0, float(rng.uniform(0.5, 10 * strength + 0.5)), pixels.shape[:2])[..., None]
    if rng.random() < 0.2:
        share = float(rng.uniform(0, 0.003)) * strength
        pixels[rng.random(pixels.shape[:2]) < share] = float(rng.choice([0, 255]))
    picture = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(round(90 - 60 * strength), 96)))
        picture = Image.open(buffer).convert("RGB")
    return np.array(picture), boxes


def _turned(boxes: np.ndarray, degrees: float, cx: float, cy: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    x, y = boxes[:, [0, 2, 2, 0]] - cx, boxes[:, [1, 1, 3, 3]] - cy
    u, v = cx + np.cos(angle) * x + np.sin(angle) * y, cy - np.sin(angle) * x + np.cos(angle) * y
    return np.stack([u.min(1), v.min(1), u.max(1), v.max(1)], axis=1)
