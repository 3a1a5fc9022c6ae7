"""Experiments of `sfa study`: SFA against controls and placebos."""
