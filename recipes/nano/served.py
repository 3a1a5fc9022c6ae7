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
from sfa_adapters.recipes import qwen2_5_vl_7b
from sfa_adapters.recipes.nano.hosts import build_host

__all__ = ["HEAD", "served_host", "wide_host", "write_served"]

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


def wide_host(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A host with the widths of Qwen2.5-VL-7B and few layers.

    Four layers are of its tower, one of them with full attention (in the whole model one of eight), and two of its
    language model.
    What a server spends on a page beside the model is the same as with a model of full size, so this says what share it
    has of a layer of full width. Vocabulary and processor are those of the nano host.

    Args:
        seed: Of the random weights; the global random state is left as it was.

    Returns:
        The model, in fp32 and in eval mode, and its processor.
    """
    narrow, processor = build_host("qwen2_5_vl", seed)
    config: Any = copy.deepcopy(narrow.config)
    full: Any = qwen2_5_vl_7b.architecture()
    vocabulary = config.text_config.vocab_size
    config.vision_config, config.text_config = copy.deepcopy(full.vision_config), copy.deepcopy(full.text_config)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 4, [3]
    text = config.text_config
    text.num_hidden_layers, text.layer_types, text.vocab_size = 2, ["full_attention"] * 2, vocabulary
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, getattr(narrow.config.text_config, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = type(narrow)(config).eval()
    model.generation_config = narrow.generation_config
    return model, processor


def write_served(family: str, folder: Path, seed: int = 0, wide: bool = False) -> tuple[Path, Path]:
    """Writes a host and an adapter of it, with all four terms and scalars of some logits.

    Args:
        family: Name of its record.
        folder: Gets `host` and `adapter`.
        seed: Of the weights and of the scalars.
        wide: Whether it is `wide_host`.

    Returns:
        The two folders.
    """
    model, processor = wide_host(seed) if wide else served_host(family, seed)
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
