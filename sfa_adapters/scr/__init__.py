"""SCR, structural consistency regularization: loss terms on attention and answers for fine-tuning."""

from sfa_adapters.scr.config import SCRConfig
from sfa_adapters.scr.loss import SCRLoss
from sfa_adapters.scr.trainer import SCRTrainerMixin

__all__ = ["SCRConfig", "SCRLoss", "SCRTrainerMixin"]
