"""Nano hosts as checkpoint folders: what `from_pretrained` loads for the full-size hosts, two thousand times smaller.

A folder holds the configuration, the weights and the host's own processor class: InternVL tiles and expands
`<IMG_CONTEXT>`, LLaVA-OneVision cuts anyres crops, Qwen takes any size. So `--nano` runs the code of the real run.
The tokenizer knows characters, and bytes for every other one, so that Korean is read too. LLaVA-OneVision starts from
the weights of this package, which can read charts; the others know nothing yet.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
)

from sfa_adapters.errors import RecipeError
from sfa_adapters.recipes.encode import IMAGE, PAD, SPECIAL, UNKNOWN, VIDEO, nano_tokenizer
from sfa_adapters.recipes.nano import PATCH, PIXELS, load_nano
from sfa_adapters.recipes.questions import PHRASES
from sfa_adapters.training.recipe import DEFAULT_PROMPT, Family, Recipe

__all__ = ["NANO", "build_host", "nano", "nano_checkpoint", "nano_settings"]

NANO = "nano:"  # `model` of a recipe whose nano host is not written yet, with the family behind it
MARK = "nano.json"  # written last: a folder that has it is complete
VERSION = 1
# Each family writes turns as its full-size host does. LLaVA-OneVision's weights were trained on bare questions.
_PART = "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}"
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}" + _PART + "{% endfor %}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}" + _CONTENT + "<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
_VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper }}: " + _CONTENT + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PLAIN = (
    "{% for message in messages %}" + _CONTENT + "{{ '<eos>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)
# White is 0 and black -2, as in `encode.pixel_values`.
_LOOK: Mapping[str, Any] = {"image_mean": [1.0] * 3, "image_std": [0.5] * 3}
WIDTH, TILE = 64, 112
_VISION: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": TILE,
    "patch_size": 14,
}


def nano_checkpoint(family: Family, folder: str | Path, seed: int = 0) -> Path:
    """Writes the nano host of a family as a checkpoint folder, unless it is there already.

    The folder is written under another name and renamed, so it is complete or not there. The same family and seed give
    the same weights.

    Args:
        family: Which host.
        folder: Where. Its parents are made.
        seed: Of weights that are new; the global random state is left as it was.

    Returns:
        The folder, for `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained`.

    Raises:
        RecipeError: No such family, or the folder holds something else.
    """
    if family not in _BUILDERS:
        raise RecipeError(f"No nano host of the family {family!r}. Known: {', '.join(get_args(Family))}.")
    folder = Path(folder)
    mark = {"family": family, "seed": seed, "version": VERSION}
    if _is_written(folder, mark):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model, processor = build_host(family, seed)
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        (draft / MARK).write_text(json.dumps(mark))
        draft.chmod(0o755)
        try:
            os.replace(draft, folder)
        except OSError:
            # Another process of the same run was quicker; otherwise something else came in between.
            if not _is_written(folder, mark):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_written(folder: Path, mark: Mapping[str, Any]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = folder / MARK
    if not found.is_file():
        raise RecipeError(f"{folder} holds something else than a nano host. Name a new folder, or delete this one.")
    if json.loads(found.read_text()) != mark:
        raise RecipeError(f"{folder} holds another nano host: {found.read_text()}. Name a new folder, or delete it.")
    return True


def build_host(family: Family, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The nano host of a family in memory.

    Args:
        family: Which host.
        seed: Of weights that are new; the global random state is left as it was.

    Returns:
        The model, in fp32 and in eval mode, and its processor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[family]()


def _tokenizer(end: str, specials: tuple[str, ...], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """The characters of `nano_tokenizer` under the same ids, then 256 bytes, then the special tokens of the host."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    base = nano_tokenizer()
    pad, unknown = SPECIAL[PAD], SPECIAL[UNKNOWN]
    words = sorted(base.get_vocab(), key=base.get_vocab().__getitem__)
    vocabulary = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore[reportAttributeAccessIssue]
    added = [w for w in (*words, *specials, *named.values()) if len(w) > 1]
    core.add_tokens([AddedToken(w, normalized=False) for w in added if w in PHRASES])
    core.add_special_tokens([AddedToken(w, normalized=False) for w in added if w not in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        extra_special_tokens=dict(named),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _template(layout: str, picture: str) -> str:
    return layout.replace("PICTURE", picture)


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.05,  # the usual 0.02 is meant for wide layers
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _ending(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ends: Any) -> PreTrainedModel:
    """Tells the model where an answer ends."""
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model.eval()


def _internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer("<|im_end|>", ("<|im_start|>", "<|im_end|>"), named)
    config = InternVLConfig(
        vision_config={**_VISION, "attention_bias": True},
        text_config=Qwen3Config(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(TILE // 14 // 2) ** 2,
        tie_word_embeddings=False,
    )
    model = _ending(InternVLForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    look: dict[str, Any] = {"size": {"height": TILE, "width": TILE}, **_LOOK}
    return model, InternVLProcessor(
        GotOcr2ImageProcessor(**look, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer,
        InternVLVideoProcessor(**look),
        image_seq_length=config.image_seq_length,
        chat_template=_template(_CHATML, "<IMG_CONTEXT>\n"),
    )


def _llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer("<eos>", (), {"image_token": "<image>", "video_token": "<video>"})
    model = load_nano("llava_onevision").model
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # bytes and special tokens are new
    model = _ending(model, tokenizer, tokenizer.eos_token_id)
    assert (model.config.image_token_id, model.config.video_token_id) == (IMAGE, VIDEO)
    # The base picture, and one crop of it, or two for one that is long.
    points = [[PIXELS, PIXELS], [PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS]]
    model.config.image_grid_pinpoints = points
    look: dict[str, Any] = {"size": {"height": PIXELS, "width": PIXELS}, **_LOOK}
    return model, LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**look, image_grid_pinpoints=points),
        tokenizer,
        LlavaOnevisionVideoProcessor(**look),
        num_image_tokens=(PIXELS // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_template(_PLAIN, "<image>"),
    )


def _llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer("</s>", ("</s>",), {"image_token": "<image>"})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(TILE // 14) ** 2,
        vision_feature_layer=-2,  # the last layer is never read, as in LLaVA-1.5
    )
    model = _ending(LlavaForConditionalGeneration(config), tokenizer, tokenizer.eos_token_id)
    size: dict[str, Any] = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    return model, LlavaProcessor(
        CLIPImageProcessor(**size, **_LOOK),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template(_VICUNA, "<image>\n"),
    )


def _qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    specials = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = _tokenizer("<|im_end|>", specials, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    token = tokenizer.convert_tokens_to_ids
    text = _text(tokenizer)
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": WIDTH, "intermediate_size": 172, "num_heads": 4, "out_hidden_size": WIDTH,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        text_config=text,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    ends = [token("<|im_end|>"), token("<|endoftext|>")]  # two, as the full-size host has
    model = _ending(Qwen2_5_VLForConditionalGeneration(config), tokenizer, ends)
    size = {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
    return model, Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**_LOOK, size=size),
        tokenizer,
        Qwen2VLVideoProcessor(**_LOOK, size=size),
        chat_template=_template(_CHATML, "<|vision_start|><|image_pad|><|vision_end|>"),
    )


_BUILDERS: Mapping[Family, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
}


def nano_settings(recipe: Recipe) -> Recipe:
    """The recipe on the nano host of its family: a minute on a CPU instead of hours on a GPU.

    Plan `bf16` (one device, nothing in 4-bit) in float32, rendered charts, few and short steps. Terms, layers, freezes,
    ADAT, SCR and LoRA stay. Set what you want otherwise on the recipe that comes back: `nano_settings(r).replace(...)`.

    Args:
        recipe: Of a full-size host, or one that came from here, which stays as it is.

    Returns:
        The recipe. Its `model` is `nano:` and the family until `nano` writes the host.
    """
    if recipe.model.startswith(NANO) or (Path(recipe.model) / MARK).is_file():
        return recipe
    return recipe.replace(
        model=NANO + recipe.family,
        revision=None,
        plan="bf16",
        dtype="float32",
        lr=1e-3,
        vision_lr=None,
        projector_lr=None,
        llm_lr=None,
        warmup_steps=2,
        max_steps=recipe.max_steps or 24,
        batch_size=8,
        micro_batch=4,
        data="charts",
        data_config=None,
        train_split="train",
        eval_split="test",
        limit=recipe.limit or 64,
        eval_limit=recipe.eval_limit or 32,
        prompt="{question}" if recipe.prompt == DEFAULT_PROMPT else recipe.prompt,
        max_tiles=2,
        max_pixels=140 * 140,
        streaming=False,
        num_workers=0,
        max_new_tokens=12,
        output="runs/{name}-nano" if recipe.output == "runs/{name}" else recipe.output,
        save_steps=8,
        logging_steps=1,
        log="none",
    )


def nano(recipe: Recipe, folder: str | Path, seed: int = 0) -> Recipe:
    """`nano_settings`, and the host written where its `model` then points to.

    Args:
        recipe: Of a full-size host, or one that came from `nano_settings`.
        folder: Of the host, see `nano_checkpoint`.
        seed: Of the host's weights.

    Raises:
        RecipeError: The folder holds something else.
    """
    recipe = nano_settings(recipe)
    if not recipe.model.startswith(NANO):
        return recipe
    return recipe.replace(model=str(nano_checkpoint(recipe.family, folder, seed)))
