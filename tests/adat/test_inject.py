"""Adaptive tokens in real towers: exact where they must be, the same for batches and single images, and removable."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from sfa_adapters import eject_sfa, features_of, inject_sfa
from sfa_adapters.adat import AdaptiveTokenizer, PatchPolicy, eject_adat, inject_adat, latest_plans, token_padding
from sfa_adapters.adat.plan import PatchPlan
from sfa_adapters.adat.tokenizer import AdatState
from sfa_adapters.errors import InjectionError, LayoutError, NoMatchingBackboneError, PlanError
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.models import HOSTS, HostName, build_nano
from sfa_adapters.tower_search import find_tower
from tests.support.compare import (
    assert_close,
    assert_same_gradients,
    difference,
    gradients,
    read,
    strong_config,
    structural,
)
from tests.support.towers import CASES, SMALL, TowerCase, set_checkpointing, set_eager

ADAPTIVE = [case for case in CASES if case.backbone in ("clip", "internvit", "siglip", "timm_vit")]
adaptive_tower = pytest.mark.parametrize("case", ADAPTIVE, ids=str)
one_of_each = pytest.mark.parametrize(
    "case", [c for c in ADAPTIVE if c.name in ("clip", "internvit", "siglip", "timm_reg4")], ids=str
)


@dataclass(frozen=True)
class Pattern:
    """A scorer of three densities in turn; one pixel of the image decides where they start. Bright images are dense."""

    cell: int

    def __call__(self, images: Tensor) -> Tensor:
        rows, columns = (-(-side // self.cell) for side in images.shape[-2:])
        start = (images[:, 0, 5, 5] * 777).long()[:, None]
        density = (torch.tensor([0, 1, 2, 2, 1, 2])[torch.arange(rows * columns) % 6] + start) % 3 / 2
        density = torch.where(images.mean((1, 2, 3))[:, None] > 0.95, 1.0, density)
        return density.view(-1, rows, columns)


def mixed(patch: int, **options: Any) -> PatchPolicy:
    """Three levels: half the tower's patch, its own, and twice as large."""
    return PatchPolicy(levels=[(0.7, patch // 2), (0.3, patch), (0.0, 2 * patch)], scorer=Pattern(2 * patch), **options)


def patch_of(tower: nn.Module) -> int:
    seam = find_tower(tower).backbone.patches
    assert seam is not None
    projection: Any = tower.get_submodule(seam.projection)
    return projection.kernel_size[0]


def with_tokens(case: TowerCase, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    tower, inputs = case.fresh()
    return inject_adat(tower, AdaptiveTokenizer(policy=mixed(patch_of(tower)), **options)), inputs


def packed_input(tower: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the encoder is given: the packed, embedded tokens."""
    seam = find_tower(tower).backbone.patches
    assert seam is not None
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs.get("inputs_embeds"))

    handle = tower.get_submodule(seam.tokens_in).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        tower(**inputs) if not isinstance(tower, timm.models.VisionTransformer) else tower(inputs["pixel_values"])
    finally:
        handle.remove()
    return seen[0]


@adaptive_tower
def test_one_level_of_the_towers_own_patch_gives_its_own_embedding_bit_for_bit(case: TowerCase) -> None:
    tower, inputs = case.fresh()
    plain, uniform = read(case, tower, inputs), packed_input(tower, inputs)
    patch = patch_of(tower)
    inject_adat(tower, PatchPolicy(levels=[(0.0, patch)], scorer="uniform", cell=2 * patch))
    packed = packed_input(tower, inputs)[0]
    plans = latest_plans(tower)
    for image, (tokens, plan) in enumerate(zip(packed.split(uniform.shape[1]), plans, strict=True)):
        place, token, weight = plan.grid_pairs()
        assert torch.equal(weight, torch.ones_like(weight))
        assert torch.equal(tokens[: case.prefix], uniform[image, : case.prefix])
        assert torch.equal(tokens[case.prefix :][token], uniform[image, case.prefix :][place])
    # In the encoder only the order of summation differs.
    assert_close(read(case, tower, inputs), plain)


def slow_tokens(tower: nn.Module, plan: PatchPlan, image: Tensor, table: Tensor) -> Tensor:
    """Every token by its definition, one at a time."""
    seam = find_tower(tower).backbone.patches
    assert seam is not None
    projection: Any = tower.get_submodule(seam.projection)
    patch, (height, width) = plan.patch, plan.padded_size
    page = F.pad(
        image[None, :, : plan.image_size[0], : plan.image_size[1]],
        (0, width - plan.image_size[1], 0, height - plan.image_size[0]),
        mode="replicate",
    )[0]
    rows = []
    for top, left, size, _ in plan.boxes.tolist():
        side = round(size)
        crop = page[:, round(top) : round(top) + side, round(left) : round(left) + side]
        kernel = resample_patch_embed(projection.weight, [side, side])
        token = torch.einsum("chw,dchw->d", crop, kernel) + (0 if projection.bias is None else projection.bias)
        place, total = 0, 0.0
        for r in range(table.shape[0]):
            for c in range(table.shape[1]):
                if side > patch:
                    share = max(0, min(top + size, (r + 1) * patch) - max(top, r * patch))
                    share *= max(0, min(left + size, (c + 1) * patch) - max(left, c * patch))
                else:
                    middle = ((top + size / 2) / patch - 0.5, (left + size / 2) / patch - 0.5)
                    middle = (min(max(middle[0], 0), table.shape[0] - 1), min(max(middle[1], 0), table.shape[1] - 1))
                    share = max(0, 1 - abs(middle[0] - r)) * max(0, 1 - abs(middle[1] - c))
                place, total = place + share * table[r, c], total + share
        rows.append(token + place / total)
    return torch.stack(rows)


@adaptive_tower
def test_tokens_of_any_size_are_what_their_definition_says(case: TowerCase) -> None:
    tower, inputs = with_tokens(case)
    packed = packed_input(tower, inputs)[0]
    seam = find_tower(tower).backbone.patches
    assert seam is not None
    grid = case.grid
    assert grid is not None
    table = seam.positions(tower).unflatten(0, grid)
    start = 0
    for plan, image in zip(latest_plans(tower), inputs["pixel_values"], strict=True):
        assert len(set(plan.token_level.tolist())) == 3, "the case must hold all three sizes"
        tokens = packed[start + case.prefix : start + case.prefix + plan.num_tokens]
        assert_close(tokens, slow_tokens(tower, plan, image, table))
        start += case.prefix + plan.num_tokens
    assert start == len(packed)


@adaptive_tower
def test_a_batch_is_its_images_one_at_a_time_and_keeps_their_order(case: TowerCase) -> None:
    tower, inputs = with_tokens(case)
    together = read(case, tower, inputs)
    assert len({plan.num_tokens for plan in latest_plans(tower)}) == 2, "the images must differ in length"
    alone = torch.cat([read(case, tower, single) for single in case.split(inputs)])
    assert_close(together, alone)
    turned = read(case, tower, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
    assert_close(torch.cat(turned.chunk(2)[::-1]), together)


@adaptive_tower
@pytest.mark.parametrize("sfa_first", [True, False], ids=["sfa_first", "adat_first"])
def test_sfa_follows_the_tokens_and_every_backend_agrees_with_eager(case: TowerCase, sfa_first: bool) -> None:
    results: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for backend in ("dense", "folded", "auto", "eager"):
        tower, inputs = case.fresh()
        if backend == "eager":
            set_eager(case, tower)
        policy = mixed(patch_of(tower))
        torch.manual_seed(3)
        config = strong_config(backend="auto" if backend == "eager" else backend)
        if sfa_first:
            inject_adat(inject_sfa(tower, config), policy)
        else:
            inject_sfa(inject_adat(tower, policy), config)
        results[backend] = (read(case, tower, inputs), gradients(case, tower, inputs))
    plain, inputs = with_tokens(case)
    assert difference(read(case, plain, inputs), results["dense"][0]) > 1e-3, "the bias must act"
    for backend in ("folded", "auto", "eager"):
        assert_close(results[backend][0], results["dense"][0], what=backend)
        assert_same_gradients(results[backend][1], results["dense"][1])
    assert all(name in results["dense"][1] for name in structural(tower))


@one_of_each
def test_sfa_on_a_uniform_plan_is_sfa_on_the_grid(case: TowerCase) -> None:
    tower, inputs = case.fresh()
    torch.manual_seed(3)
    inject_sfa(tower, strong_config())
    before = read(case, tower, inputs)
    inject_adat(tower, PatchPolicy(levels=[(0.0, patch_of(tower))], scorer="uniform"))
    assert_close(read(case, tower, inputs), before)


@adaptive_tower
def test_ejected_is_bit_exact_and_leaves_no_trace(case: TowerCase) -> None:
    tower, inputs = case.fresh()
    keys, before = set(tower.state_dict()), read(case, tower, inputs)
    attributes = {name: set(module.__dict__) for name, module in tower.named_modules()}
    inject_adat(tower, AdaptiveTokenizer(policy=mixed(patch_of(tower)), residual=True))
    assert difference(read(case, tower, inputs), before) > 1e-4
    assert eject_adat(tower) is tower
    assert set(tower.state_dict()) == keys
    assert torch.equal(read(case, tower, inputs), before)
    assert {name: set(module.__dict__) for name, module in tower.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tower.modules())


@one_of_each
@pytest.mark.parametrize("first", ["sfa", "adat"])
def test_sfa_and_adat_are_ejected_in_any_order(case: TowerCase, first: str) -> None:
    tower, inputs = case.fresh()
    before = read(case, tower, inputs)
    torch.manual_seed(3)
    inject_sfa(tower, strong_config())
    with_sfa = read(case, tower, inputs)
    inject_adat(tower, mixed(patch_of(tower)))
    read(case, tower, inputs)
    if first == "adat":
        assert torch.equal(read(case, eject_adat(tower), inputs), with_sfa)
        eject_sfa(tower)
    else:
        eject_sfa(tower)
        plain, _ = with_tokens(case)
        assert torch.equal(read(case, tower, inputs), read(case, plain, inputs))
        eject_adat(tower)
    assert torch.equal(read(case, tower, inputs), before)


def test_ejected_the_bias_no_longer_expects_packed_images() -> None:
    """A forward run layer by layer is still under way when adaptive tokens go; its packed tokens fit no grid now."""
    case = next(c for c in CASES if c.name == "siglip")
    tower: Any
    tower, inputs = case.fresh()
    inject_adat(inject_sfa(tower, strong_config()), mixed(14))
    between: list[Tensor] = []

    def stop(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        between.append(args[0])
        raise InterruptedError

    handle = tower.encoder.layers[1].register_forward_pre_hook(stop)
    states = tower.embeddings(inputs["pixel_values"])
    with pytest.raises(InterruptedError):
        tower.encoder(inputs_embeds=states)
    handle.remove()
    assert len(between[0]) == 1, "all images in one sequence"
    eject_adat(tower)
    with pytest.raises(LayoutError, match=f"got {between[0].shape[1]} tokens.*outside of a call of the tower"):
        tower.encoder.layers[1](between[0], None)


@adaptive_tower
def test_the_residual_starts_at_zero_and_learns(case: TowerCase) -> None:
    plain, inputs = with_tokens(case)
    tower, _ = with_tokens(case, residual=True)
    assert torch.equal(read(case, tower, inputs), read(case, plain, inputs))
    grads = gradients(case, tower, inputs)
    assert grads["adat_residual.out.weight"].abs().max() > 0
    with torch.no_grad():
        tower.get_parameter("adat_residual.out.weight").normal_()
    assert difference(read(case, tower, inputs), read(case, plain, inputs)) > 1e-4
    flat = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], 9.0)}  # no large patch anywhere
    assert set(gradients(case, tower, flat)) == set(grads), "DDP needs a gradient for every parameter in every step"


@one_of_each
def test_every_parameter_learns_as_it_does_through_eager_attention_and_checkpointing(case: TowerCase) -> None:
    tower, inputs = with_tokens(case)
    tower.train()
    grads = gradients(case, tower, inputs)
    assert set(grads) >= {n for n, p in tower.named_parameters() if "head" not in n and "post_layernorm" not in n}
    for reentrant in (False, True):
        other, _ = with_tokens(case)
        other.train()
        set_checkpointing(case, other, reentrant)
        again = {**inputs, "pixel_values": inputs["pixel_values"].clone().requires_grad_()}
        assert_same_gradients(gradients(case, other, again), grads)


@adaptive_tower
def test_tokens_can_be_handed_on_with_their_places(case: TowerCase) -> None:
    tower, inputs = case.fresh()
    policy = mixed(patch_of(tower))
    if case.name == "siglip":  # its pooling head would look at padding
        with pytest.raises(InjectionError, match="pools over all tokens"):
            inject_adat(tower, AdaptiveTokenizer(policy=policy, output="tokens"))
        tower = SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=56, patch_size=14, vision_use_head=False))
    grid = inject_adat(copy.deepcopy(tower), policy)
    inject_adat(tower, AdaptiveTokenizer(policy=policy, output="tokens"))
    with torch.no_grad():
        handed, laid = torch.stack(case.hidden(tower, inputs)), torch.stack(case.hidden(grid, inputs))
    padding = token_padding(tower)
    assert handed.shape[:2] == padding.shape
    for image, plan in enumerate(latest_plans(tower)):
        assert int((~padding[image]).sum()) == case.prefix + plan.num_tokens == plan.layout(case.prefix).num_tokens
        place, token, weight = plan.grid_pairs()
        back = torch.zeros(laid.shape[1] - case.prefix, laid.shape[2])
        back.index_add_(0, place, handed[image, case.prefix :][token] * weight[:, None].float())
        whole = torch.bincount(place) == 1  # a mean of small tokens passes the norm behind the encoder after the mean
        assert 0 < int(whole.sum()) < len(whole)
        assert_close(back[whole], laid[image, case.prefix :][whole])


@pytest.mark.parametrize("name", ["clip", "internvit", "siglip"])
def test_recorded_hidden_states_lie_on_the_grid_too(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    tower, inputs = with_tokens(case)
    with torch.no_grad():
        out: Any = tower(**inputs, output_hidden_states=True)
        parts: Any = tower(**inputs, output_hidden_states=True, return_dict=False)
    assert len(out.hidden_states) == case.layers + 1
    assert {tuple(states.shape) for states in out.hidden_states} == {(2, 16 + case.prefix, 32)}
    recorded = next(part for part in parts if isinstance(part, tuple))
    assert all(torch.equal(a, b) for a, b in zip(recorded, out.hidden_states, strict=True))


@one_of_each
def test_copies_and_pickles_work_on_their_own(case: TowerCase) -> None:
    tower, inputs = with_tokens(case)
    before = read(case, tower, inputs)
    twin = copy.deepcopy(tower)
    state: AdatState = features_of(twin)["adat"]
    assert state.plans == (), "a copy starts without the batch that its original saw"
    assert torch.equal(read(case, twin, inputs), before)
    eject_adat(twin)
    assert torch.equal(read(case, tower, inputs), before)
    again = pickle.loads(pickle.dumps(tower))
    assert torch.equal(read(case, again, inputs), before)


@one_of_each
def test_other_image_sizes_and_cells_that_do_not_divide_them(case: TowerCase) -> None:
    tower, _ = with_tokens(case)
    assert case.resized is not None
    inputs = case.resized(0)  # 3x5 patches: the last cells are half padding
    with torch.no_grad():
        states = torch.stack(case.hidden(tower, inputs))
    height, width = (side // patch_of(tower) for side in inputs["pixel_values"].shape[-2:])
    assert states.shape[1] == case.prefix + height * width
    assert torch.isfinite(states).all()
    uniform, _ = case.fresh()
    plain = read(case, uniform, inputs)
    inject_adat(uniform, PatchPolicy(levels=[(0.0, patch_of(uniform))], scorer="uniform", cell=2 * patch_of(uniform)))
    assert_close(read(case, uniform, inputs), plain)


@one_of_each
def test_autocast_and_half_precision(case: TowerCase) -> None:
    tower, inputs = with_tokens(case)
    full = read(case, tower, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(read(case, tower, inputs).float(), full, 0.05)
    tower.to(torch.bfloat16)
    half = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    assert read(case, tower, half).dtype == torch.bfloat16


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_answer_with_adaptive_tokens(host: HostName) -> None:
    nano = build_nano(host)
    images = [torch.randint(0, 255, (144, 144, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    batch = encode(nano, images, ["What is the value of A?"] * 2)
    with torch.no_grad():
        plain = nano.model(**batch).logits
        inject_adat(nano.model, PatchPolicy(levels=[(0.0, 12)], scorer="uniform"))
        assert_close(nano.model(**batch).logits, plain, 1e-4)
        eject_adat(nano.model)
        statistics: Any = {"image_mean": (1.0, 1.0, 1.0), "image_std": (0.5, 0.5, 0.5)}
        inject_adat(nano.model, AdaptiveTokenizer(policy=PatchPolicy(scorer="edges", budget=0.6), **statistics))
        alone = {k: v[:1] for k, v in batch.items()}
        assert_close(nano.model(**batch).logits[:1], nano.model(**alone).logits, 1e-4)
        answer: Any = nano.model
        assert answer.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 2
    assert all(plan.ratio <= 0.6 for plan in latest_plans(nano.model))


def test_bad_input_is_named_and_changes_nothing() -> None:
    case = next(c for c in CASES if c.name == "siglip")
    tower, inputs = case.fresh()
    before = read(case, tower, inputs)
    with pytest.raises(InjectionError, match="no adaptive tokens"):
        eject_adat(tower)
    inject_adat(tower, mixed(14))
    with pytest.raises(InjectionError, match="not seen an image"):
        latest_plans(tower)
    with pytest.raises(InjectionError, match="already"):
        inject_adat(tower)
    with pytest.raises(PlanError, match=r"\[batch, 3, height, width\]"):
        tower(torch.zeros(1, 1, 56, 56))
    with pytest.raises(LayoutError, match="pixel values"):
        tower.encoder(inputs_embeds=torch.zeros(1, 16, 32))  # pyright: ignore[reportCallIssue]
    eject_adat(tower)
    assert torch.equal(read(case, tower, inputs), before)
    for name in ("qwen2_5", "internvit_remote"):
        other = next(c for c in CASES if c.name == name).build()
        with pytest.raises(InjectionError, match="adaptive tokens"):
            inject_adat(other)
    with pytest.raises(NoMatchingBackboneError):
        inject_adat(nn.Linear(2, 2))
    with pytest.raises(InjectionError, match="output"):
        AdaptiveTokenizer(output="list")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InjectionError, match="image_std"):
        AdaptiveTokenizer(image_std=(0.5, 0.0, 0.5))


def test_towers_whose_tokens_cannot_be_exchanged_are_refused() -> None:
    for options, message in (
        ({"pos_embed": "none"}, "absolute position"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"pos_drop_rate": 0.5}, "pos_drop_rate"),
    ):
        keywords: Any = options
        tower = timm.create_model("vit_tiny_patch16_224", depth=1, **keywords)
        with pytest.raises(InjectionError, match=message):
            inject_adat(tower)
        assert not any(m._forward_pre_hooks for m in tower.modules())


def test_large_patches_that_the_residual_cannot_reach_are_named() -> None:
    case = next(c for c in CASES if c.name == "clip")
    tower, inputs = case.fresh()
    policy = PatchPolicy(levels=[(0.5, 14), (0.0, 42)], cell=42, scorer=Pattern(42))
    inject_adat(tower, AdaptiveTokenizer(policy=policy, residual=True))
    with pytest.raises(PlanError, match="28, 56"):
        tower(**inputs)
