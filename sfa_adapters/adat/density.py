"""The density estimator: a small convolutional network that predicts which share of each place of a page is text.

Six layers, 3-32-64-128-64-32-1: five 3 x 3 convolutions with batch norm and ReLU, then a 1 x 1 head with a sigmoid. The
first four convolutions have stride 2, so one output cell stands for 16 x 16 pixels and sees 95 x 95.

A network that sees 95 pixels finds no print that is larger, and a scan at 600 dpi has no other. So a page is looked at
in its size, or made smaller to at most 0.9 million pixels, which bounds time and memory, too.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sfa_adapters.errors import DataError, WeightsError

__all__ = ["STRIDE", "DensityEstimator"]

STRIDE = 16
# A network never says exactly 0: on noise and shadow it says some hundredths. Chosen on the validation pages, where the
# error is as small with it as without (0.0065); blank scans go from a mean of at most 0.036 to 0.015.
FLOOR = 0.03
MOST_PIXELS = 900_000  # of a look: a page of 790 x 1120, with print of 10 pt 5 px high
WIDTHS = (3, 32, 64, 128, 64, 32)
# The weights that come with the library: name, and SHA-256 of `density_NAME.safetensors`. The first is the default.
SHIPPED = {
    "real": "ae53dd23f4a87297eb59396a578d8866b9dc6fdc386a7b068a1aab675ce27c0f",
    "rendered": "f79fed96d73ce9bea70f8a729ab3fca4b1201784f8d9df12ea056ee96935aebf",
}
FOLDER = Path(__file__).parent
COMMAND = "sfa density train"


class DensityEstimator(nn.Module):
    """Estimates text density, with 186,177 parameters.

    The constructor gives an untrained one; the library uses `DensityEstimator.pretrained()`.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(WIDTHS)):
            convolution = nn.Conv2d(before, after, 3, stride=2 if number < 4 else 1, padding=1)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(WIDTHS[-1], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Estimates the text density of each cell of 16 x 16 pixels.

        Args:
            images: RGB in [0, 1], before a tower's normalisation, float `[B, 3, H, W]`. Sides that are no multiple of
                16 are padded by repeating the last row and column of pixels.

        Returns:
            Densities from 0 (empty paper) to 1 (dense text), `[B, ceil(H / 16), ceil(W / 16)]`.

        Raises:
            DataError: Not a batch of RGB images in floating point, or an image without pixels.
        """
        self._check(images)
        height, width = images.shape[-2:]
        grid = (-(-height // STRIDE), -(-width // STRIDE))
        density = self.logits(_at_most(images, MOST_PIXELS)).sigmoid()[:, None]
        density = (density - FLOOR).clamp(min=0) / (1 - FLOOR)
        if grid != tuple(density.shape[-2:]):
            density = F.interpolate(density, grid, mode="bilinear", align_corners=False)
        return density[:, 0]

    def logits(self, images: Tensor) -> Tensor:
        """One look, before the sigmoid, as training needs it; arguments and shape as in `forward`."""
        self._check(images)
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            images = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        weight: Tensor = self.head.weight
        images = images.to(weight.dtype).contiguous(memory_format=torch.channels_last) - 0.5
        return self.head(self.features(images))[:, 0]

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
            raise DataError(
                f"images {tuple(images.shape)} {images.dtype} must be [batch, 3, height, width], floating point in "
                "[0, 1]."
            )

    def fused(self) -> nn.Module:
        """A copy for inference, in eval mode, with the batch norms fused into the convolutions."""
        import copy

        model = copy.deepcopy(self).eval()
        layers: list[nn.Module] = []
        for convolution, norm in zip(model.features[0::3], model.features[1::3], strict=True):
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            layers += [fuse_conv_bn_eval(convolution, norm), nn.ReLU(inplace=True)]
        model.features = nn.Sequential(*layers)
        return model.to(memory_format=torch.channels_last).requires_grad_(False)

    @classmethod
    def pretrained(cls, weights: str | Path | None = None) -> Self:
        """Loads weights that come with the library, or a file that `sfa density train` wrote.

        Args:
            weights: "real" (the default: trained on real pages), "rendered" (trained on rendered ones, the default
                before), or a safetensors file. The SHA-256 of shipped files is checked first.

        Returns:
            The estimator in eval mode, without gradients.

        Raises:
            WeightsError: The file is missing or damaged, or belongs to another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        name = next(iter(SHIPPED)) if weights is None else str(weights)
        digest = SHIPPED.get(name)
        file = Path(name) if digest is None else FOLDER / f"density_{name}.safetensors"
        if not file.is_file():
            raise WeightsError(
                f"No weights of the density estimator at {file}. Give a file, or one of {', '.join(SHIPPED)}; install "
                f"the package again, or: {COMMAND}"
            )
        raw = file.read_bytes()
        if digest is not None and (present := hashlib.sha256(raw).hexdigest()) != digest:
            raise WeightsError(
                f"{file} has sha256 {present}, expected {digest}: the file is damaged or another one. Install the "
                f"package again, or train the weights: {COMMAND}"
            )
        try:
            stored = load(raw)
        except SafetensorError as error:
            raise WeightsError(
                f"{file} is not a readable safetensors file ({error}). Train weights: {COMMAND}"
            ) from error
        model = cls()
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        names = sorted(wanted.keys() | stored.keys())
        wrong = [n for n in names if n not in stored or wanted.get(n) != tuple(stored[n].shape)]
        if wrong:
            raise WeightsError(
                f"{file} does not fit the density estimator: {len(wrong)} tensors differ, first {wrong[0]!r}."
            )
        model.load_state_dict(stored)
        return model.eval().requires_grad_(False)


def _at_most(images: Tensor, pixels: int) -> Tensor:
    """Images made smaller, where they have more than some number of pixels: areas are averaged, then interpolated."""
    height, width = images.shape[-2:]
    factor = (height * width / pixels) ** 0.5
    if factor <= 1:
        return images
    if (whole := int(factor)) > 1:  # averages whole pixels first: it reads the page once, and is fast
        images = F.avg_pool2d(images, whole, ceil_mode=True)
    size = (max(1, round(height / factor)), max(1, round(width / factor)))
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
