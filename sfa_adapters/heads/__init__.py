"""S4 head calibration: scores of attention heads, plans of which to prune, and pruning that shrinks the weights."""

from sfa_adapters.heads.axial_heads import calibrate_axial
from sfa_adapters.heads.calibrate import calibrate_heads
from sfa_adapters.heads.expected import expected_speedup
from sfa_adapters.heads.plan import HeadPlan, plan_heads
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.pruned_files import load_pruned, save_pruned
from sfa_adapters.heads.receipt import PruneReceipt, prune_receipt, take_probe
from sfa_adapters.heads.scores import HeadScores
from sfa_adapters.heads.snapshot import unpruned
from sfa_adapters.moved import know_old_names

__all__ = [
    "HeadPlan",
    "HeadScores",
    "PruneReceipt",
    "calibrate_axial",
    "calibrate_heads",
    "expected_speedup",
    "load_pruned",
    "plan_heads",
    "prune_heads",
    "prune_receipt",
    "save_pruned",
    "take_probe",
    "unpruned",
]

know_old_names(__name__)  # `whole`
