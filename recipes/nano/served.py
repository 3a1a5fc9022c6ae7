"""Nano hosts that inference engines can serve, in a folder, and an adapter whose bias changes their answers.

vLLM's attention for CPUs takes heads of 32 channels and more, so the language model has half as many heads of twice the
width. Weights are random, so answers are too: they say whether two programs compute the same, and nothing else. They
are made larger than usual where an image would otherwise hardly change what follows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from sfa_adapters.config import SFAConfig
from sfa_adapters.inject import inject_sfa, save_sfa
from sfa_adapters.recipes.nano.hosts import build_host

__all__ = ["HEAD", "served_host", "write_served"]

HEAD = 32  # channels of a head of the language model


def served_host(family: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The nano host of a family with wide heads in its language model.

    Args:
        family: Name of its record.
        seed: Of the weights; the global random state is left as it was.

    Returns:
        The model, in fp32 and in eval mode, and its processor.
    """
    narrow, processor = build_host(family, seed)
    config: Any = copy.deepcopy(narrow.config)
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = text.hidden_size // HEAD, 1, HEAD
    # With tied embeddings a random model repeats its last token, whatever it sees.
    config.tie_word_embeddings = text.tie_word_embeddings = False
    rope = text.rope_parameters
    if "mrope_section" in rope:
        before = sum(rope["mrope_section"])
        text.rope_parameters = {**rope, "mrope_section": [n * HEAD // 2 // before for n in rope["mrope_section"]]}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = type(narrow)(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("lambda_1", "lambda_2")):  # layer scale, which starts at 0.1
                parameter.fill_(1.0)
            elif parameter.ndim > 1 and any(part in name for part in ("qkv", "q_proj", "k_proj", "v_proj", "o_proj")):
                parameter.mul_(4)
            elif parameter.ndim > 1 and any(part in name for part in ("attn.proj", "out_proj", "projection_layer")):
                parameter.mul_(8)
            elif parameter.ndim > 1 and "merger" in name:
                parameter.mul_(9 if family == "qwen3_vl" and "deepstack" not in name else 3)
    model.generation_config = narrow.generation_config
    return model, processor


def write_served(family: str, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Writes a host and an adapter of it, with all four terms and scalars of some logits.

    Args:
        family: Name of its record.
        folder: Gets `host` and `adapter`.
        seed: Of the weights and of the scalars.

    Returns:
        The two folders.
    """
    model, processor = served_host(family, seed)
    host, adapter = folder / "host", folder / "adapter"
    if family in ("llava", "llava_onevision"):
        # Checkpoints on the hub have `vision_model.` in the names of SigLIP and CLIP, and engines expect it.
        # transformers drops it on loading, and writes it again only for a model that was loaded with it.
        state = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in model.state_dict().items()}
        model.save_pretrained(host, state_dict=state, save_original_format=False)
    else:
        model.save_pretrained(host)
    processor.save_pretrained(host)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = SFAConfig(terms=["row", "col", "dist", "block"], init="axial", init_strength=3.0, init_std=1.0)
        inject_sfa(model, config)
    save_sfa(model, adapter)
    return host, adapter
