"""`prune_heads`: removes attention heads from the weights of a model, in place, with different head counts per layer.

Query rows, output columns and the keys and values of groups without queries are cut out, so the model has fewer
parameters, a smaller cache and less to compute. Its results are those of the model with the same heads set to zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.compensation import (
    Compensation,
    add_mean_bias,
    check_compensation,
    mean_inputs,
    move_residual,
)
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.kinds import HeadGeometry, read_geometry
from sfa_adapters.heads.slicing import Edits, channels
from sfa_adapters.layer import CHILD_NAME, SFALayer
from sfa_adapters.tuner import note_head_counts
from sfa_adapters.vlm.parts import plain_model
from sfa_adapters.vlm.records import check_allowed

__all__ = ["PRUNED", "Pruned", "Target", "find_targets", "prune_heads", "slice_heads"]

Model = TypeVar("Model", bound=nn.Module)
PRUNED = "_pruned_heads"
_LOST = "_lost_heads"  # set on a pruned attention module: its head numbers are no longer those of the original


@dataclass(frozen=True)
class Pruned:
    """Record of the pruning of a model, kept with the model and saved with it.

    Attributes:
        plan: The pruned heads, by paths in the model without wrappers of PEFT.
        compensation: What was done for them.
        biases: Attention modules whose output projection got a bias and had none.
    """

    plan: HeadPlan
    compensation: str
    biases: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Target:
    """One attention module that is pruned.

    Attributes:
        path: Its path in the model without wrappers of PEFT.
        name: Its path in the head plan.
        module: The module.
        geometry: Its heads before pruning.
    """

    path: str
    name: str
    module: nn.Module
    geometry: HeadGeometry

    @property
    def output(self) -> nn.Module:
        """The output projection."""
        return getattr(self.module, self.geometry.kind.output)


def prune_heads(
    model: Model,
    plan: HeadPlan,
    compensation: Compensation = "none",
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> Model:
    """Removes the attention heads of a plan from a language model, a vision tower or a whole host.

    Works with LoRA and with SFA, whose matrices and scalars are sliced too. `model.config` keeps the original counts,
    because layers may differ, so plain `from_pretrained` cannot load such a model; see `save_pruned` and `load_pruned`.
    Prune before making an optimizer, and before quantising.

    Args:
        model: The model; it is changed in place.
        plan: The heads to prune, from `plan_heads`; its counts must be those of the model.
        compensation: What is done for the pruned heads, see `sfa_adapters.heads.compensation`.
        batches: For `bias` only: keyword arguments of the model's forward, on which means are measured.

    Returns:
        The same model.

    Raises:
        InjectionError: The plan does not fit the model, heads were removed before, or an attention module is quantised,
            shared, of an unknown class or adapted by something that cannot be sliced. The model is as it was.
        RecipeError: The plan removes nothing, or the compensation cannot be used. The model is as it was.

    Example:
        >>> from sfa_adapters.recipes.nano.models import load_nano
        >>> model = load_nano().model
        >>> path = "model.language_model.layers.0.self_attn"
        >>> model = prune_heads(model, HeadPlan({path: (1,)}, {path: 4}, {path: 4}))
    """
    check_compensation(compensation, batches)
    check_allowed(model, "heads", InjectionError)
    targets = find_targets(model, plan)
    means = mean_inputs(model, {t.path: t.output for t in targets}, batches) if batches is not None else {}
    edits, biases = Edits(), []
    for target in targets:
        kept, removed = plan.kept(target.name), plan.removed[target.name]
        output, name = target.output, f"{target.path}.{target.geometry.kind.output}"
        gone = channels(removed, target.geometry.head_dim)
        if target.path in means and add_mean_bias(edits, name, output, gone, means[target.path]):
            biases.append(target.path)
        if compensation == "residual":
            move_residual(edits, target.path, target.module, target.geometry, kept, removed)
        slice_heads(edits, target, plan)
        if compensation == "absorb":
            edits.scale_inputs(name, output, target.geometry.num_heads / len(kept))
    edits.commit()
    note_head_counts(model)
    # Layers that keep all heads stay in the plan, because its rate includes them.
    base = plain_model(model)
    paths = {id(module): path for path, module in base.named_modules()}
    by_path = {paths[id(_find(model, base, name))]: name for name in plan.num_heads}
    named_plan = HeadPlan(
        {path: plan.removed[name] for path, name in by_path.items()},
        {path: plan.num_heads[name] for path, name in by_path.items()},
        {path: plan.num_kv_heads[name] for path, name in by_path.items()},
        plan.how,
    )
    base.__dict__[PRUNED] = Pruned(named_plan, compensation, tuple(biases))
    return model


def find_targets(model: nn.Module, plan: HeadPlan) -> list[Target]:
    """Finds the attention modules from which a plan removes heads, and checks them against the plan.

    Args:
        model: The model, with wrappers of PEFT or without.
        plan: The head plan.

    Raises:
        InjectionError: The plan does not fit the model, or a module cannot be pruned.
        RecipeError: The plan removes nothing.
    """
    if not plan.count:
        raise RecipeError("The head plan removes no head: there is nothing to prune.")
    base = plain_model(model)
    if PRUNED in base.__dict__:
        raise InjectionError(
            f"{type(base).__name__} has lost heads before. Make one plan for the original model, and prune that."
        )
    paths = {id(module): name for name, module in base.named_modules()}
    targets, named = [], {}
    for name in plan.num_heads:
        module = _find(model, base, name)
        first = named.setdefault(id(module), name)
        if first != name:
            raise InjectionError(f"{first} and {name} of the head plan are the same module. Name it once.")
        if hasattr(module, _LOST):
            raise InjectionError(f"{name} has lost heads before. Make one plan for the original model, and prune that.")
        geometry = read_geometry(name, module)
        counts, head_counts = (
            (geometry.num_heads, geometry.num_kv_heads),
            (plan.num_heads[name], plan.num_kv_heads[name]),
        )
        if counts != head_counts:
            raise InjectionError(
                f"{name} has {counts[0]} query and {counts[1]} key/value heads, but the plan is for "
                f"{head_counts[0]} and {head_counts[1]}: it was made for another model."
            )
        if plan.removed[name]:
            targets.append(Target(paths[id(module)], name, module, geometry))
    _check_shared(base, targets)
    return targets


def slice_heads(edits: Edits, target: Target, plan: HeadPlan) -> None:
    """Prepares the slices of one attention module: its weights, its head counts, and SFA's scalars."""
    module: Any = target.module
    geometry = target.geometry
    kind, size = geometry.kind, geometry.head_dim
    kept, kept_kv = plan.kept(target.name), plan.kept_kv(target.name)
    query, value = channels(kept, size), channels(kept_kv, size)
    if kind.fused is None:
        edits.rows(f"{target.path}.q_proj", module.q_proj, query)
        edits.rows(f"{target.path}.k_proj", module.k_proj, value)
        edits.rows(f"{target.path}.v_proj", module.v_proj, value)
    else:
        every = tuple(part * geometry.num_heads + head for part in range(3) for head in kept)
        edits.rows(f"{target.path}.{kind.fused}", getattr(module, kind.fused), channels(every, size))
    if isinstance(getattr(module, "gate", None), nn.Module):  # timm: a sigmoid on every channel of the heads
        edits.rows(f"{target.path}.gate", module.gate, query)
    edits.columns(f"{target.path}.{kind.output}", target.output, query)
    numbers = {
        "num_heads": len(kept),
        "num_key_value_heads": len(kept_kv),
        "num_key_value_groups": len(kept) // len(kept_kv),
        **dict.fromkeys(kind.widths, len(query)),
    }
    edits.values += [(module, name, number) for name, number in numbers.items() if hasattr(module, name)]
    edits.values.append((module, _LOST, True))
    sfa = getattr(module, CHILD_NAME, None)
    if isinstance(sfa, SFALayer):
        heads = channels(kept, 1)
        for scalars in (getattr(sfa, name) for name in sfa.adapter_layer_names):
            for adapter in scalars:
                edits.take(scalars, adapter, heads, 0)
        edits.values += [(sfa, "num_heads", len(kept)), (sfa, "_dense", None)]


def _find(model: nn.Module, base: nn.Module, name: str) -> nn.Module:
    for root in (base, model):
        try:
            return root.get_submodule(name)
        except AttributeError:
            continue
    raise InjectionError(f"{type(base).__name__} has no module {name!r}, which the head plan names.")


def _check_shared(base: nn.Module, targets: list[Target]) -> None:
    """Refuses modules and weights that are shared: their heads would be removed in both places, or in one only."""
    places: dict[int, list[str]] = {}
    for name, thing in _things(base):
        places.setdefault(id(thing), []).append(name)
    for target in targets:
        for _, thing in _things(target.module):
            place = places[id(thing)]
            if len(place) > 1:
                raise InjectionError(
                    f"{place[0]} and {place[1]} are the same: heads of a shared attention module or of tied weights "
                    "cannot go in one place only. Untie them first."
                )


def _things(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield from module.named_modules(remove_duplicate=False)
    yield from module.named_parameters(remove_duplicate=False)
