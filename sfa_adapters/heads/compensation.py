"""How the kept heads make up for the pruned ones. All of it changes weights once; a forward costs nothing more.

* `none`: nothing; equal to setting the output of the removed heads to zero.
* `absorb`: the kept columns of the output projection are multiplied by heads / kept heads. Exact if all heads of a
  layer contribute the same. It scales the sum of the heads, never query and key, which would sharpen attention.
* `bias`: the mean output of the removed heads is added as a bias to the output projection (FLAP, Fluctuation-based
  Adaptive Structured Pruning, arXiv 2312.11983). Exact if their output is the same for every token.
* `residual`: a share of a removed head is added to the most similar kept head. With c the cosine of their values and
  output columns taken together, beta = 0.1 * max(c, 0): V_kept += beta * V_removed, O_kept += beta * O_removed. All
  that is added to one head is clipped to 0.1 of its norm (the original code has "norm-clipped" without details).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from sfa_adapters.analysis.forward import to_device
from sfa_adapters.errors import InjectionError, NoMatchingBackboneError, RecipeError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.heads.kinds import HeadGeometry, base_linear
from sfa_adapters.heads.layers import entering
from sfa_adapters.heads.slicing import Edits, channels
from sfa_adapters.tower_search import find_tower

__all__ = ["COMPENSATIONS", "Compensation", "add_mean_bias", "check_compensation", "mean_inputs", "move_residual"]

Compensation = Literal["none", "absorb", "bias", "residual"]
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)
SHARE = 0.1  # largest share of a removed head that is moved, and of a kept head's norm that is added


def check_compensation(compensation: str, batches: Iterable[Mapping[str, Any]] | None) -> None:
    """Checks that `compensation` and `batches` of `prune_heads` fit together.

    Raises:
        RecipeError: There is no such compensation, it needs batches that are missing, or it takes none.
    """
    if compensation not in COMPENSATIONS:
        raise RecipeError(f"compensation={compensation!r} must be one of {list(COMPENSATIONS)}.")
    if compensation == "bias" and batches is None:
        raise RecipeError("compensation='bias' needs batches: the mean of what removed heads give is measured on them.")
    if compensation != "bias" and batches is not None:
        raise RecipeError(f"batches are for compensation='bias'; {compensation!r} measures nothing.")


def mean_inputs(
    model: nn.Module, outputs: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Measures the mean input of output projections over all tokens except padding.

    Args:
        model: The model; it runs in eval mode here.
        outputs: The projections by the path of their attention module.
        batches: Keyword arguments of its forward.

    Returns:
        For each path a float64 tensor `[channels]`.

    Raises:
        RecipeError: No batch came, a projection never ran, or its input is not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: Tensor | None = None
    tower = _tower_modules(model)

    def note(path: str, states: Tensor) -> None:
        # The mask is of the prompt; a tower may have the same number of patches by chance.
        if mask is not None and id(outputs[path]) not in tower and mask.shape == states.shape[:-1]:
            states = states[mask.bool()]
        tokens = states.flatten(0, -2)
        total = tokens.sum(0, dtype=torch.float64)
        sums[path] = sums[path] + total if path in sums else total
        counts[path] = counts.get(path, 0) + len(tokens)

    with evaluating(model), entering(outputs, note):
        for batch in batches:
            batch = to_device(batch, model)
            given = batch.get("attention_mask")
            mask = given if isinstance(given, Tensor) and given.ndim == 2 else None
            model(**batch)
    for path in outputs:
        if not counts.get(path):
            raise RecipeError(f"{path} never ran on the batches: there is no mean to compensate with. Give batches "
                              "that reach it, with an image where the heads of a tower go.")  # fmt: skip
        if not bool(sums[path].isfinite().all()):
            raise RecipeError(f"The heads of {path} give values that are not finite on the batches.")
    return {path: sums[path] / counts[path] for path in outputs}


def _tower_modules(model: nn.Module) -> set[int]:
    """Ids of all modules inside of the vision tower; empty if the model does not have exactly one."""
    try:
        return {id(module) for module in find_tower(model).tower.modules()}
    except (NoMatchingBackboneError, InjectionError):  # none, or several
        return set()


def add_mean_bias(edits: Edits, path: str, output: nn.Module, removed: Tensor, mean: Tensor) -> bool:
    """Adds the mean contribution of the removed channels, active LoRA included, to the output projection's bias.

    Call it before the columns are sliced.

    Args:
        edits: Collects the new bias.
        path: Path of the projection, for messages.
        output: The output projection.
        removed: Numbers of the removed channels.
        mean: Mean input of the projection, `[channels]`.

    Returns:
        Whether the projection had no bias before.
    """
    linear = base_linear(path, output)
    index = removed.to(linear.weight.device)
    weight = linear.weight.detach()[:, index].double()
    if isinstance(output, LoraLinear) and not output.disable_adapters and not output.merged:
        for adapter in output.active_adapters:
            if adapter in output.lora_A:
                weight = weight + output.get_delta_weight(adapter).detach()[:, index].double()
    bias = weight @ mean.to(weight.device)[index]
    old = edits.tensor(linear, "bias")
    if old is not None:
        bias = bias + old.detach().double()
    edits.put(linear, "bias", bias, linear.weight if old is None else old)
    return old is None


def move_residual(
    edits: Edits, path: str, module: nn.Module, geometry: HeadGeometry, kept: tuple[int, ...], removed: tuple[int, ...]
) -> None:
    """Adds a share of every removed head to the most similar kept head.

    Call it before anything is sliced. Heads of one key/value group share their values: then only the output columns
    are moved and clipped.

    Args:
        edits: Collects the new weights.
        path: Path of the attention module, for messages.
        module: The attention module.
        geometry: Its heads.
        kept: Numbers of the kept heads.
        removed: Numbers of the removed heads.

    Raises:
        InjectionError: LoRA is around the values or the output: their low-rank parts cannot be moved.
    """
    kind, size = geometry.kind, geometry.head_dim
    value_name = kind.fused or "v_proj"
    for name in (value_name, kind.output):
        if isinstance(getattr(module, name), LoraLinear):
            raise InjectionError(
                f"{path}.{name} carries LoRA, whose parts cannot be moved from head to head. Merge it first "
                "(merge_and_unload), or choose another compensation."
            )
    values = base_linear(f"{path}.{value_name}", getattr(module, value_name))
    output = base_linear(f"{path}.{kind.output}", getattr(module, kind.output))
    start = 2 * geometry.num_heads * size if kind.fused else 0
    group = geometry.num_heads // geometry.num_kv_heads

    # One row of V with its bias per key/value head, one row of O per query head.
    v = values.weight.detach()[start:].float()
    if values.bias is not None:
        v = torch.cat((v, values.bias.detach()[start:, None].float()), dim=1)
    v = v.reshape(geometry.num_kv_heads, -1)
    o = output.weight.detach().float().T.reshape(geometry.num_heads, -1)
    both = nn.functional.normalize(torch.cat((v.repeat_interleave(group, 0), o), dim=1), dim=1)
    to_v, to_o = torch.zeros_like(v), torch.zeros_like(o)
    for head in removed:
        cosines = both[list(kept)] @ both[head]
        best = int(cosines.argmax())
        target, beta = kept[best], SHARE * max(float(cosines[best]), 0.0)
        to_o[target] += beta * o[head]
        if target // group != head // group:
            to_v[target // group] += beta * v[head // group]
    v, o = v + _clip(to_v, v), o + _clip(to_o, o)

    v = v.reshape(geometry.num_kv_heads * size, -1)
    weight = values.weight.detach().clone()
    weight[start:] = v[:, : weight.shape[1]].to(weight.dtype)
    edits.put(values, "weight", weight, values.weight)
    if values.bias is not None:
        bias = values.bias.detach().clone()
        bias[start:] = v[:, -1].to(bias.dtype)
        edits.put(values, "bias", bias, values.bias)
    columns = channels(tuple(range(geometry.num_heads)), size)
    assert len(columns) == output.in_features
    edits.put(output, "weight", o.reshape(output.in_features, -1).T, output.weight)


def _clip(added: Tensor, had: Tensor) -> Tensor:
    """Clips each added row to `SHARE` of the norm of the row that it is added to."""
    norm = added.norm(dim=1, keepdim=True)
    return added * (SHARE * had.norm(dim=1, keepdim=True) / norm.clamp_min(1e-30)).clamp_max(1.0)
