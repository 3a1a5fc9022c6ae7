"""A small imitation of the modelling file of InternViT checkpoints, which the hub serves as remote code.

Written from the interface alone (names, shapes, order of operations), so that the backbone for that file is tested
without a download. Classes are found by `*.modeling_intern_vit.<Class>`, hence the name of this file.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling


class InternVisionConfig(PreTrainedConfig):
    """Configuration with the remote file's field names."""

    model_type = "intern_vit_stand_in"

    def __init__(self, **kwargs: Any) -> None:
        self.hidden_size = kwargs.pop("hidden_size", 32)
        self.intermediate_size = kwargs.pop("intermediate_size", 64)
        self.num_hidden_layers = kwargs.pop("num_hidden_layers", 3)
        self.num_attention_heads = kwargs.pop("num_attention_heads", 4)
        self.image_size = kwargs.pop("image_size", 56)
        self.patch_size = kwargs.pop("patch_size", 14)
        self.qk_normalization = kwargs.pop("qk_normalization", True)
        self.qkv_bias = kwargs.pop("qkv_bias", False)
        self.use_flash_attn = kwargs.pop("use_flash_attn", False)
        self.initializer_factor = kwargs.pop("initializer_factor", 0.1)
        super().__init__(**kwargs)


class InternRMSNorm(nn.Module):
    """RMS norm over the last dimension."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[batch, tokens, width]` to the same shape."""
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * states.to(hidden_states.dtype)


class InternVisionEmbeddings(nn.Module):
    """CLS token and patches, with position embeddings that follow the size of the image."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.patch_size = config, config.patch_size
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, self.patch_size, stride=self.patch_size)
        self.side = config.image_size // self.patch_size
        self.position_embedding = nn.Parameter(torch.randn(1, self.side**2 + 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps images to tokens, `[batch, 1 + patches, width]`."""
        patches = self.patch_embedding(pixel_values)
        height, width = patches.shape[-2:]
        table = self.position_embedding[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        position = torch.cat((self.position_embedding[:, :1], table.flatten(2).transpose(1, 2)), dim=1)
        cls = self.class_embedding.expand(len(pixel_values), -1, -1).to(patches.dtype)
        return torch.cat((cls, patches.flatten(2).transpose(1, 2)), dim=1) + position.to(patches.dtype)


class InternAttention(nn.Module):
    """Fused q, k and v, and no mask argument."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_dim, self.num_heads = config.hidden_size, config.num_attention_heads
        self.use_flash_attn = config.use_flash_attn
        self.head_dim = self.embed_dim // self.num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=config.qkv_bias)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.qk_normalization = config.qk_normalization
        if self.qk_normalization:
            self.q_norm, self.k_norm = InternRMSNorm(self.embed_dim), InternRMSNorm(self.embed_dim)
        self.proj = nn.Linear(self.embed_dim, self.embed_dim)

    def _naive_attn(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.qk_normalization:
            q = self.q_norm(q.transpose(1, 2).flatten(-2, -1)).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            k = self.k_norm(k.transpose(1, 2).flatten(-2, -1)).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        attn = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj_drop(self.proj(x))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[batch, tokens, width]` to the same shape."""
        if self.use_flash_attn:
            raise AssertionError("the stand-in has no flash kernel")
        return self._naive_attn(hidden_states)


class InternMLP(nn.Module):
    """Two linear layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[batch, tokens, width]` to the same shape."""
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class InternVisionEncoderLayer(nn.Module):
    """Attention and MLP, each scaled."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attn, self.mlp = InternAttention(config), InternMLP(config)
        self.norm1, self.norm2 = InternRMSNorm(config.hidden_size), InternRMSNorm(config.hidden_size)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[batch, tokens, width]` to the same shape."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states).to(hidden_states.dtype)) * self.ls1
        return hidden_states + self.mlp(self.norm2(hidden_states).to(hidden_states.dtype)) * self.ls2


class InternVisionEncoder(nn.Module):
    """The layers; as in the original, they are checkpointed reentrantly in training unless that is switched off.

    (The original leaves `use_reentrant` out, which means True, with a warning of torch.)
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = True
        self.checkpoint_options = SimpleNamespace(use_reentrant=True)

    def forward(self, inputs_embeds: Tensor, output_hidden_states: bool | None = None) -> BaseModelOutput:
        """Runs the layers on `[batch, tokens, width]`."""
        hidden_states, recorded = inputs_embeds, ()
        for layer in self.layers:
            recorded = (*recorded, hidden_states)
            if self.gradient_checkpointing and self.training:
                hidden_states = checkpoint(layer, hidden_states, use_reentrant=self.checkpoint_options.use_reentrant)
            else:
                hidden_states = layer(hidden_states)
        recorded = (*recorded, hidden_states) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=recorded)


class InternVisionModel(PreTrainedModel):
    """The tower."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InternVisionEncoderLayer"]  # noqa: RUF012 - the attribute of the base class

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(
        self,
        pixel_values: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Hidden states of all tokens, `[batch, 1 + patches, width]`."""
        hidden = self.embeddings(pixel_values) if pixel_embeds is None else pixel_embeds
        out = self.encoder(inputs_embeds=hidden, output_hidden_states=output_hidden_states)
        last = out.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=last[:, 0], hidden_states=out.hidden_states
        )
