"""The records of hosts that a recipe can name as its `family`.

The class of a record is `sfa_adapters.vlm.spec.VLMSpec`, on a lower floor: token reduction, heads and SCR read it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sfa_adapters.vlm.places import Part, Places
from sfa_adapters.vlm.records import registered_vlms, vlm_spec
from sfa_adapters.vlm.spec import VLMSpec

__all__ = ["HOSTS", "Part", "Places", "VLMSpec", "families"]


def families() -> tuple[str, ...]:
    """Names of the records that a recipe can name as its `family`."""
    return tuple(name for name, spec in registered_vlms().items() if spec.refusal("train") is None)


class _Hosts(Mapping[str, VLMSpec]):
    """The records by name, looked up each time, because a package may register more."""

    def __getitem__(self, name: str) -> VLMSpec:
        if name not in families():
            raise KeyError(name)
        return vlm_spec(name)

    def __iter__(self) -> Iterator[str]:
        return iter(families())

    def __len__(self) -> int:
        return len(families())


HOSTS: Mapping[str, VLMSpec] = _Hosts()
HostSpec = VLMSpec  # its name before 0.1
