"""Every error and warning of sfa_adapters. All errors are `SFAError`; their text says what is wrong and what to do."""

__all__ = [
    "AdapterMismatchError",
    "BiasNotAppliedError",
    "ContractError",
    "DataError",
    "InjectionError",
    "LayoutError",
    "MergeError",
    "NoMatchingBackboneError",
    "ObservationError",
    "PlanError",
    "RecipeError",
    "SFAError",
    "SFAWarning",
    "ServingError",
    "TrainingError",
    "UnknownInterfaceError",
    "UnsupportedAttentionError",
    "UntestedVersionWarning",
    "WeightsError",
]


class SFAError(Exception):
    """Base of all errors of this library."""


class SFAWarning(UserWarning):
    """Base of all warnings of this library; used itself where no subclass is needed."""


class NoMatchingBackboneError(SFAError, ValueError):
    """No registered backbone fits the model; the text says why, or lists the attention modules that were seen."""


class InjectionError(SFAError, ValueError):
    """An option does not fit the model it is applied to (unknown layer, heads, injected twice, ...)."""


class LayoutError(SFAError, ValueError):
    """A token layout does not fit the tokens (wrong count, shape, block ids out of range, ...)."""


class MergeError(SFAError, NotImplementedError):
    """A merge of a structural bias into the weights of its model was requested, which is impossible."""


class UnsupportedAttentionError(SFAError, ValueError):
    """The attention implementation of the model cannot carry a bias."""


class BiasNotAppliedError(SFAError, RuntimeError):
    """An injected attention layer ran without using its bias."""


class AdapterMismatchError(SFAError, ValueError):
    """A saved adapter belongs to another tower, or a newer version of this library wrote it."""


class ContractError(SFAError, ValueError):
    """A contract suite of `sfa_adapters.testing` cannot run: a small tower is incomplete, or cannot be found."""


class WeightsError(SFAError, ValueError):
    """A weight file is missing, has the wrong hash, or does not fit the model."""


class DataError(SFAError, ValueError):
    """A data row or image cannot be used (no answer, unreadable, too large, missing column, ...)."""


class PlanError(SFAError, ValueError):
    """A patch policy, a density map or a token budget cannot be used (unordered levels, NaN, too few tokens, ...)."""


class ObservationError(SFAError, RuntimeError):
    """Attention could not be read: the implementation bypasses SDPA and softmax, nothing ran, or logits are NaN."""


class RecipeError(SFAError, ValueError):
    """A recipe, a device plan or a run's folder cannot be used (unknown key, does not fit the memory, ...)."""


class TrainingError(SFAError, RuntimeError):
    """Training stopped: a tensor that should train gets no gradient, the loss is NaN, a checkpoint was lost, ..."""


class ServingError(SFAError, RuntimeError):
    """An engine (vLLM, SGLang) cannot serve an adapter, or would serve it without its bias."""


class UnknownInterfaceError(SFAError, RuntimeError):
    """A library passes something under a name that is not known here: ignoring it would give silently wrong results."""


class UntestedVersionWarning(SFAWarning):
    """An installed library is older or newer than what this version of sfa-adapters was tested with."""
