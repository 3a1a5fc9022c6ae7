"""Images of different grids in one computation: whatever mask the tower passes, each attends under its own bias.

The reference runs each image alone, without padding, through the plain tower, with phi pair by pair on its logits.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.functional import set_adapter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfa_adapters import inject_sfa, registry
from sfa_adapters.arrangement import ImageTokens, TokenArrangement
from sfa_adapters.errors import LayoutError
from sfa_adapters.registry import Backbone, Geometry, registered_backbones
from sfa_adapters.testing.reference import SlowAttention, layer_phi, regular_places
from sfa_adapters.tuner import injected_layers
from tests.support import compare

HEADS, WIDTH = 2, 16
MIXED = ((2, 3), (3, 4), (1, 2))
SEVERAL = [
    pytest.param(MIXED, id="mixed"),
    pytest.param(((2, 3),), id="alone"),
    pytest.param(((3, 2),) * 3, id="equal"),
]
BACKENDS = pytest.mark.parametrize("backend", ["dense", "folded"])
EAGER = pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])


class JoinedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.eager = HEADS, False
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if not self.eager:
            out = F.scaled_dot_product_attention(query, key, value, attention_mask)
        else:
            logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            logits = logits if attention_mask is None else logits + attention_mask
            out = logits.softmax(-1) @ value
        return out.transpose(1, 2).flatten(2)


class JoinedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), JoinedAttention()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.attention(self.norm(x), mask)


class Embedding(nn.Module):
    """Gives its tokens in one of several forms."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(WIDTH, WIDTH), "tensor"

    def forward(self, tokens: Tensor) -> Any:
        tokens = self.linear(tokens)
        forms: dict[str, Any] = {
            "tensor": tokens,
            "tuple": (tokens, "grid"),
            "output": {"last_hidden_state": tokens, "grid": None},
            "object": SimpleNamespace(tokens=tokens),
        }
        return forms[self.form]


class JoinedTower(nn.Module):
    """Takes tokens, how they lie, and any mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding()
        self.layers = nn.ModuleList([JoinedLayer(), JoinedLayer()])
        self.grad_checkpointing = False

    def forward(self, tokens: Tensor, arrangement: Any, mask: Tensor | None = None) -> Tensor:
        given: Any = self.embedding(tokens)
        form = self.embedding.form
        x: Any = given if form == "tensor" else given[0] if form == "tuple" else None
        x = given["last_hidden_state"] if form == "output" else given.tokens if form == "object" else x
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.grad_checkpointing else layer(x, mask)
        return x


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Backbone(
        name="joined",
        towers=("*.JoinedTower",),
        attentions=("*.JoinedAttention",),
        geometry=lambda tower: Geometry(grid=None, prefix_tokens=0),
        layouts=lambda tower, args, kwargs: args[1],
        joined="padded",
    )
    monkeypatch.setattr(registry, "_BACKBONES", {**registered_backbones(), "joined": record})


def tower(**options: Any) -> Any:
    torch.manual_seed(0)
    plain = JoinedTower().requires_grad_(False)
    torch.manual_seed(3)
    return inject_sfa(plain, compare.strong_config(**options))


def arranged(joined: Any, grids: tuple[tuple[int, int], ...], spare: int, prefix: int = 1) -> TokenArrangement:
    longest = max(h * w for h, w in grids) + spare
    padding = [longest - h * w if joined == "padded" else 0 for h, w in grids]
    images = tuple(ImageTokens(grid, padding=tail) for grid, tail in zip(grids, padding, strict=True))
    return TokenArrangement(joined, images, prefix)


def one_by_one(arrangement: TokenArrangement) -> list[Tensor]:
    """Tokens of each image, `[tokens, width]`."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, WIDTH, generator=generator) for length in arrangement.lengths]


def joined_tokens(arrangement: TokenArrangement) -> Tensor:
    """The input of the tower; padding is as large as anything else."""
    images = one_by_one(arrangement)
    if arrangement.joined == "packed":
        return torch.cat(images)[None]
    return torch.stack([F.pad(image, (0, 0, 0, arrangement.num_tokens - len(image)), value=3.0) for image in images])


def separate(arrangement: TokenArrangement, states: Tensor) -> list[Tensor]:
    if arrangement.joined == "packed":
        return list(states[0].split(list(arrangement.lengths)))
    return [image[:length] for image, length in zip(states, arrangement.lengths, strict=True)]


def reference(model: Any, arrangement: TokenArrangement) -> list[Tensor]:
    """Each image alone, without padding."""
    phis = [
        [
            layer_phi(layer, regular_places(image.grid, arrangement.prefix_tokens), image.grid)
            for image in arrangement.images
        ]
        for _, _, layer in injected_layers(model)
    ]
    torch.manual_seed(0)
    plain = JoinedTower().requires_grad_(False)
    outputs: list[Tensor] = []
    for number, image in enumerate(one_by_one(arrangement)):
        with SlowAttention([layer[number] for layer in phis]) as slow:
            outputs.append(plain(image[None], arrangement)[0])
        assert slow.calls == 2
    return outputs


def visible(arrangement: TokenArrangement, symmetric: bool) -> Tensor:
    """Which pairs a tower lets see each other, bool, `[B, 1, N, N]`, or `[B, 1, 1, N]` where only keys are hidden."""
    if arrangement.joined == "packed":
        return torch.block_diag(*(torch.ones(n, n) for n in arrangement.lengths)).bool()[None, None]
    real = torch.arange(arrangement.num_tokens) < torch.tensor(arrangement.lengths)[:, None]
    keys = real[:, None, None, :]
    return keys & real[:, None, :, None] if symmetric else keys


def as_mask(seen: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
    if kind in ("bool", "none"):
        return seen if kind == "bool" else None
    hidden = float("-inf") if kind == "minus infinity" else torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden)


@BACKENDS
@EAGER
@pytest.mark.parametrize("grids", SEVERAL)
@pytest.mark.parametrize("joined", ["padded", "packed"])
def test_each_image_attends_under_its_own_bias_whatever_mask_there_is(
    joined: str, grids: Any, eager: bool, backend: Any
) -> None:
    model = tower(backend=backend)
    for layer in model.layers:
        layer.attention.eager = eager
    several = itertools.product((0, 2), (False, True)) if joined == "padded" else [(0, True)]
    for spare, symmetric in several:
        arrangement = arranged(joined, grids, spare)
        expected = reference(model, arrangement)
        for kind in ("bool", "minus infinity", "lowest number", "none"):
            # Eager attention makes rows without any key NaN, with and without a bias, and adds no boolean mask.
            if eager and (kind == "bool" or (kind == "minus infinity" and symmetric and joined == "padded")):
                continue
            mask = as_mask(visible(arrangement, symmetric), kind)
            output = model(joined_tokens(arrangement), arrangement, mask)
            assert output.isfinite().all()
            for image, alone in zip(separate(arrangement, output), expected, strict=True):
                compare.assert_close(image, alone, what=f"{joined}, {kind}, symmetric={symmetric}, spare={spare}")


@BACKENDS
@pytest.mark.parametrize("joined", ["padded", "packed"])
def test_two_adapters_add_up_and_none_is_the_plain_tower(joined: str, backend: Any) -> None:
    model = tower(backend=backend)
    plain = copy.deepcopy(model)
    compare.fill(plain, 0.0)
    arrangement = arranged(joined, MIXED, 1)
    inputs = (joined_tokens(arrangement), arrangement, as_mask(visible(arrangement, True), "lowest number"))
    alone = model(*inputs)
    inject_sfa(model, compare.strong_config(backend=backend), adapter_name="second")
    assert not torch.equal(model(*inputs), alone)
    set_adapter(model, ["default", "second"])
    both = model(*inputs)
    with torch.no_grad():
        for name, parameter in compare.structural(model).items():
            if name.endswith("second"):
                parameter.zero_()
    same = list(zip(separate(arrangement, model(*inputs)), separate(arrangement, alone), strict=True))
    assert all(compare.difference(first, second) < 1e-5 for first, second in same)
    assert compare.difference(both, alone) > 1e-2
    torch.manual_seed(0)
    expected = JoinedTower()(*inputs)
    for image, untouched in zip(separate(arrangement, plain(*inputs)), separate(arrangement, expected), strict=True):
        compare.assert_close(image, untouched)


@pytest.mark.parametrize("form", ["tensor", "tuple", "output", "object"])
@pytest.mark.parametrize(("joined", "backend"), [("padded", "dense"), ("padded", "folded"), ("packed", "dense")])
def test_checkpointed_layers_get_the_gradients_of_their_own_images(joined: str, backend: Any, form: str) -> None:
    """Two forwards of as many tokens on other grids are under way in a frozen tower when the first runs backward."""
    model = tower(backend=backend).train()
    model.embedding.form = form
    pair = [arranged(joined, grids, 1) for grids in (MIXED, tuple((w, h) for h, w in MIXED))]

    def gradients(arrangements: list[TokenArrangement]) -> list[dict[str, Tensor]]:
        losses = [model(joined_tokens(a), a, as_mask(visible(a, True), "lowest number")) for a in arrangements]
        results: list[dict[str, Tensor]] = []
        for loss, arrangement in zip(losses, arrangements, strict=True):
            model.zero_grad()
            torch.cat(separate(arrangement, loss)).square().mean().backward()
            results.append(
                {name: p.grad.clone() for name, p in compare.structural(model).items() if p.grad is not None}
            )
        return results

    expected = [gradients([arrangement])[0] for arrangement in pair]
    model.grad_checkpointing = True
    for result, alone in zip(gradients(pair), expected, strict=True):
        compare.assert_same_gradients(result, alone)


@EAGER
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_hides_in_half_precision_and_its_rows_stay_finite(
    dtype: torch.dtype, backend: Any, eager: bool
) -> None:
    """A row of padding that is NaN would spoil all rows of the next layer."""
    model, arrangement = tower(backend=backend, init_std=0.5), arranged("padded", MIXED, 1)
    for layer in model.layers:
        layer.attention.eager = eager
    seen, tokens = visible(arrangement, True), joined_tokens(arrangement)
    exact = model(tokens, arrangement, as_mask(seen, "lowest number"))
    output = model.to(dtype)(tokens.to(dtype), arrangement, as_mask(seen, "lowest number", dtype))
    assert output.isfinite().all()
    for image, alone in zip(separate(arrangement, output), separate(arrangement, exact), strict=True):
        compare.assert_close(image.float(), alone, tolerance=0.02)


def test_a_mask_is_checked_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[str] = []
    monkeypatch.setattr("sfa_adapters.layer.check_hidden_padding", lambda mask, lengths, where: checks.append(where))
    model, arrangement = tower(), arranged("padded", MIXED, 1)
    mask = as_mask(visible(arrangement, True), "bool")
    for _ in range(2):
        model(joined_tokens(arrangement), arrangement, mask)
    assert checks == ["layers.0.attention"]
    model(joined_tokens(arrangement), arrangement, as_mask(visible(arrangement, True), "bool"))
    assert checks == ["layers.0.attention"] * 2
    copy.deepcopy(model)


OTHER = arranged("packed", ((3, 4), (2, 3), (1, 2)), 0)


@pytest.mark.parametrize("kind", ["bool", "minus infinity", "lowest number"])
@pytest.mark.parametrize(
    ("joined", "seen", "text"),
    [
        (
            "packed",
            visible(OTHER, True),
            r"layers\.0\.attention: the mask of the model does not keep images of \[7, 13, 3\] tokens",
        ),
        (
            "packed",
            visible(OTHER, True)[..., 1:, 1:],
            r"layers\.0\.attention got a mask \(1, 1, 22, 22\) for images of \[7, 13, 3\]",
        ),
        ("packed", torch.ones(1, 1, 23, 23, dtype=torch.bool), r"does not keep images of \[7, 13, 3\] tokens apart"),
        (
            "padded",
            torch.ones(3, 1, 1, 14, dtype=torch.bool),
            r"layers\.0\.attention: .* tokens behind the 7 of image 0.*padding",
        ),
    ],
)
def test_a_mask_that_does_not_fit_the_images_is_an_error(joined: str, seen: Tensor, text: str, kind: str) -> None:
    model, arrangement = tower(), arranged(joined, MIXED, 1)
    with pytest.raises(LayoutError, match=text):
        model(joined_tokens(arrangement), arrangement, as_mask(seen, kind))


@pytest.mark.parametrize("joined", ["padded", "packed"])
def test_other_tokens_than_the_images_have_are_an_error(joined: str) -> None:
    model, arrangement = tower(), arranged(joined, MIXED, 1)
    with pytest.raises(LayoutError, match=r"joined layer got .* tokens"):
        model(joined_tokens(arrangement)[:, 1:], arrangement)
    if joined == "padded":
        with pytest.raises(LayoutError, match="describes 3 images, but the batch has 2"):
            model(joined_tokens(arrangement)[:2], arrangement)


def test_no_image_is_an_error_with_a_name() -> None:
    with pytest.raises(LayoutError, match=r"at least one image; its list of images .* is empty"):
        tower()(torch.zeros(0, 3, WIDTH), [])


def test_equal_images_without_padding_share_one_layout() -> None:
    assert arranged("padded", ((2, 3),) * 3, 0).layout(None).batch_size is None
    assert arranged("padded", ((2, 3),) * 3, 1).layout(None).batch_size == 3
    assert arranged("padded", ((2, 3), (3, 2)), 0).layout(None).batch_size == 2
