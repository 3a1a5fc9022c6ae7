"""Adds the name SFA to PEFT's enum of adapter methods, `PeftType`.

PEFT registers third-party methods with `register_peft_method`, but refuses names that are not members of its closed
enum `PeftType`, and an enum cannot be extended through its public interface. So the member is added here, at import,
once, and only if PEFT does not have it. Nothing else of PEFT is touched. This file can go the day PEFT ships the name.
"""

from __future__ import annotations

from peft.utils import PeftType

__all__ = ["SFA_PEFT_TYPE"]

NAME = "SFA"


def _add_member() -> PeftType:
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)  # attribute access, PeftType.SFA, on Python 3.12 and later
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


SFA_PEFT_TYPE = _add_member()
