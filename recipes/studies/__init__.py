"""Experiments: what SFA is worth, measured against controls and placebos. `sfa study --help`."""
