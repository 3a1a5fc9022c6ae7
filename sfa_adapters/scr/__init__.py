"""SCR, structural consistency regularization: attention and answers as terms of a loss while fine-tuning."""

from sfa_adapters.scr.config import SCRConfig
from sfa_adapters.scr.loss import SCRLoss
from sfa_adapters.scr.trainer import SCRTrainerMixin

__all__ = ["SCRConfig", "SCRLoss", "SCRTrainerMixin"]
