"""Nano hosts: real vision-language models of `transformers`, small enough to train on two CPU cores."""

from sfa_adapters.recipes.nano.models import HOSTS, HostName, NanoHost, build_nano, load_nano, weights_path
from sfa_adapters.recipes.nano.weights import put_weights, read_weights

__all__ = [
    "HOSTS",
    "HostName",
    "NanoHost",
    "build_nano",
    "load_nano",
    "put_weights",
    "read_weights",
    "weights_path",
]
