"""Nano hosts: real vision-language models of `transformers`, small enough to train on two CPU cores.

One host per tower family, each of the real class with a small config, so that what works here works on the full model:

* `llava_onevision`: SigLIP tower (no CLS), 144 patches of 12 pixels, Qwen2 text;
* `internvl`: InternViT tower (CLS, layer scale), pixel shuffle to 36 image tokens, Qwen3 text;
* `llava`: CLIP tower (CLS) read at layer -2, so that its last layer is unused, Llama text.

A host is pretrained without any structural bias by `recipes/nano/pretrain.py`. The weights of `llava_onevision` are
part of the package; the hash in `SHA256` is checked before they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from sfa_adapters.recipes.nano.tokenizer import EOS, IMAGE, PAD, VIDEO, nano_tokenizer
from sfa_adapters.recipes.nano.weights import put_weights, read_weights

__all__ = [
    "HOSTS",
    "HostName",
    "NanoHost",
    "build_nano",
    "load_nano",
    "weights_path",
]

HostName = Literal["llava_onevision", "internvl", "llava"]
HOSTS: tuple[HostName, ...] = get_args(HostName)
SHA256: Mapping[str, str] = {
    "llava_onevision": "bc1fc2ecae452c7573f75bc4d90179f51279860d59b1c43046858b48a746116c",
}

WIDTH, HEADS, LAYERS, PATCH, PIXELS = 128, 4, 4, 12, 144


@dataclass
class NanoHost:
    """A nano model, its tokenizer, and the number of image tokens before every question."""

    name: HostName
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    image_tokens: int
    pixels: int = PIXELS

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def _vision(pixels: int) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "image_size": pixels,
        "patch_size": PATCH,
    }


def _text(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 352,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 1024,
        # As in Qwen2 and Qwen3: at 10,000 most of 32 channels turn too fast to find a name among 145 image tokens.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.05,  # the usual 0.02 is meant for wide layers
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def _llava_onevision(vocabulary: int, pixels: int) -> tuple[PreTrainedModel, int]:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_vision(pixels), vision_use_head=False),
        text_config=Qwen2Config(**_text(vocabulary)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        # A pinpoint without area makes every image one tile: the base picture, and no crops beside it.
        image_grid_pinpoints=[[0, 0]],
        tie_word_embeddings=True,
    )
    return LlavaOnevisionForConditionalGeneration(config), (pixels // PATCH) ** 2 + 1  # + the newline token


def _internvl(vocabulary: int, pixels: int) -> tuple[PreTrainedModel, int]:
    config = InternVLConfig(
        vision_config={**_vision(pixels), "attention_bias": True},
        text_config=Qwen3Config(**_text(vocabulary)),
        image_token_id=IMAGE,
        image_seq_length=(pixels // PATCH // 2) ** 2,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config), config.image_seq_length


def _llava(vocabulary: int, pixels: int) -> tuple[PreTrainedModel, int]:
    config = LlavaConfig(
        # One layer more: the last one is never read, as in LLaVA-1.5.
        vision_config=CLIPVisionConfig(**{**_vision(pixels), "num_hidden_layers": LAYERS + 1}),
        text_config=LlamaConfig(**_text(vocabulary)),
        image_token_index=IMAGE,
        image_seq_length=(pixels // PATCH) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config), config.image_seq_length


def _place(model: PreTrainedModel, pixels: int) -> None:
    """Initialises position embeddings as sines of row and column, so that a tower need not learn what a row is."""
    side, quarter = pixels // PATCH, WIDTH // 4
    angle = torch.arange(side)[:, None] * 20 ** (-torch.arange(quarter) / quarter)
    line = torch.cat((angle.sin(), angle.cos()), -1)  # [side, WIDTH / 2]
    grid = torch.cat((line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)), -1).flatten(0, 1)
    for name, p in model.named_parameters():
        if "position_embedding" in name:
            with torch.no_grad():
                p.view(-1, WIDTH)[-side * side :] = grid * 0.5


def build_nano(host: HostName, seed: int = 0, pixels: int = PIXELS) -> NanoHost:
    """Builds an untrained nano host.

    Args:
        host: one of `HOSTS`.
        seed: seeds the weights; the global random state is left as it was.
        pixels: side of its pictures, a multiple of 12 (`internvl`: of 24).

    Returns:
        The host, in fp32 and in eval mode, with `sdpa` attention in both towers.

    Raises:
        ValueError: unknown host, or another size.
    """
    builders = {"llava_onevision": _llava_onevision, "internvl": _internvl, "llava": _llava}
    if host not in builders:
        raise ValueError(f"Unknown nano host {host!r}. Use one of {', '.join(HOSTS)}.")
    whole = 2 * PATCH if host == "internvl" else PATCH
    if pixels < whole or pixels % whole:
        raise ValueError(f"pixels={pixels} must be a multiple of {whole}.")
    tokenizer = nano_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, image_tokens = builders[host](len(tokenizer), pixels)
        _place(model, pixels)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = None
    return NanoHost(host, model.eval(), tokenizer, image_tokens, pixels)


def weights_path(host: HostName) -> Path:
    """The file with the weights of a nano host in this package."""
    return Path(__file__).with_name(f"nano_{host}.safetensors")


def load_nano(host: HostName = "llava_onevision", pretrained: bool = True, path: Path | None = None) -> NanoHost:
    """Builds a nano host and loads its pretrained weights.

    Args:
        host: one of `HOSTS`.
        pretrained: False gives the untrained host of `build_nano`.
        path: other weights than those of the package; their hash is not checked.

    Returns:
        The host in fp32 and in eval mode.

    Raises:
        WeightsError: the file is missing, has another hash than the one in `SHA256`, or does not fit the host.
        ValueError: unknown host.
    """
    nano = build_nano(host)
    if not pretrained:
        return nano
    command = f"python -m sfa_adapters.recipes.nano.pretrain --host {host}"
    if path is None:
        stored = read_weights(weights_path(host), command, SHA256.get(host, "none that is known"))
    else:
        stored = read_weights(path, command)
    put_weights(nano.model, stored, path or weights_path(host))
    return nano
