"""Whole vision-language models (hosts): one record for each kind, and functions that find the parts of a live one."""
