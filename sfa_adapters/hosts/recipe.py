"""`Recipe`: every setting of one fine-tuning run, typed, checked, and written beside its results."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from sfa_adapters.choices import AXES, DEFAULT_SFA_LR, DEFAULT_TERMS, TERMS, Init
from sfa_adapters.errors import RecipeError

__all__ = ["DEFAULT_PROMPT", "Family", "PlanName", "Recipe"]

Family = str  # the name of a record, see `sfa_adapters.vlm.spec.VLMSpec`
PlanName = Literal["nf4", "split", "bf16", "fsdp2"]
DType = Literal["bfloat16", "float16", "float32"]
DEFAULT_PROMPT = "{question}\nAnswer the question using a single word or phrase."


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run: which host, what trains, on what, with which plan.

    Attributes:
        name: Name of the recipe, e.g. `internvl3_5_8b`.
        model: Hub id or local folder of the host.
        family: Which family of hosts it belongs to; says where tower, projector and language model are.
        revision: Commit or branch on the hub; pin it for a run that is to be repeated.
        plan: Where the parts of the host lie and in which precision: nf4, split, bf16 or fsdp2.
        dtype: Of the weights that are not in 4-bit.
        freeze_vision: The tower does not train. Its structural bias trains all the same.
        freeze_projector: The projector does not train.
        freeze_llm: The language model's own weights do not train; with nf4 they cannot.
        lora_llm: Rank of a LoRA on the language model; 0 is none.
        sfa: A structural bias in the tower.
        sfa_terms: Its terms, out of row,col,dist,block.
        sfa_layers: Layers of the tower that get it; None is all that the host reads.
        init: How its scalars start: normal, or axial (heads for rows and for columns).
        init_strength: Logits that row and column heads of axial start with.
        init_warmup_steps: Steps over which that strength rises from 0; 0 is at once.
        adat: Share of the tower's tokens that adaptive tokenization keeps, in (0, 1]; none is off.
        scr_entropy: Weight of the entropy term of SCR; 0 is off, here and below.
        scr_grounding: Weight of its grounding term.
        scr_stability: Weight of its stability term.
        lr: Peak learning rate of everything without one of its own.
        vision_lr: Of the tower.
        projector_lr: Of the projector.
        llm_lr: Of the language model or of its LoRA.
        sfa_lr: Of the structural scalars. They act in logits, and AdamW moves a scalar by about its rate per step: the
            rates of the run should add up to 3 or more.
        weight_decay: On matrices only.
        max_grad_norm: Gradients are clipped to it.
        warmup_steps: Steps in which the rate rises; a cosine to zero follows.
        epochs: Passes over the data.
        max_steps: Optimizer steps in place of epochs.
        batch_size: Questions per optimizer step, over all processes.
        micro_batch: Questions per forward of one process.
        gradient_checkpointing: Activations of tower and language model are computed again in the backward pass.
        answer_logits: In training, logits of answer tokens only: the same loss and gradients in less memory.
        seed: Of new weights, of the data order and of dropout.
        data: Hub id, local folder or file, or charts or pages for rendered ones.
        data_config: Configuration of a hub dataset, e.g. `DocVQA`.
        train_split: Name of the split to train on.
        eval_split: Name of the split to evaluate on.
        limit: Largest number of training questions.
        eval_limit: Largest number of questions in the evaluation.
        prompt: Text for the host; `{question}` stands for the question.
        max_tiles: Most tiles an image is cut into, for hosts that tile.
        max_pixels: Most pixels of an image for hosts that take any size (Qwen).
        streaming: Read a hub dataset as it arrives, without downloading it first.
        num_workers: Processes that decode images.
        max_new_tokens: Longest answer in the evaluation, in tokens.
        eval_batch: Questions per forward in the evaluation.
        output: Folder of the run.
        save_steps: Steps between checkpoints.
        save_total_limit: Checkpoints that are kept.
        logging_steps: Steps between lines of the log.
        log: Where the curves go besides the folder: `none`, or a name that `report_to` of transformers takes.

    Raises:
        RecipeError: A field cannot be used; names it and its value.
    """

    name: str
    model: str
    family: Family
    revision: str | None = None
    plan: PlanName = "nf4"
    dtype: DType = "bfloat16"
    freeze_vision: bool = False
    freeze_projector: bool = False
    freeze_llm: bool = True
    lora_llm: int = 0
    sfa: bool = True
    sfa_terms: tuple[str, ...] = DEFAULT_TERMS
    sfa_layers: tuple[int, ...] | None = None
    init: Init = "normal"
    init_strength: float = 3.0
    init_warmup_steps: int = 0
    adat: float | None = None
    scr_entropy: float = 0.0
    scr_grounding: float = 0.0
    scr_stability: float = 0.0
    lr: float = 2e-5
    vision_lr: float | None = None
    projector_lr: float | None = None
    llm_lr: float | None = None
    sfa_lr: float = DEFAULT_SFA_LR
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 100
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch: int = 1
    gradient_checkpointing: bool = True
    answer_logits: bool = True
    seed: int = 0
    data: str = "HuggingFaceM4/ChartQA"
    data_config: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    limit: int | None = None
    eval_limit: int | None = None
    prompt: str = DEFAULT_PROMPT
    max_tiles: int = 12
    max_pixels: int = 1280 * 28 * 28
    streaming: bool = False
    num_workers: int = 4
    max_new_tokens: int = 32
    eval_batch: int = 8
    output: str = "runs/{name}"
    save_steps: int = 200
    save_total_limit: int = 2
    logging_steps: int = 10
    log: str = "tensorboard"

    def __post_init__(self) -> None:
        # Here, because the command line makes its options from this class and must not wait for torch and transformers.
        from transformers.integrations.integration_utils import (
            INTEGRATION_TO_CALLBACK,  # pyright: ignore[reportUnknownVariableType]
        )

        from sfa_adapters.hosts.spec import families
        from sfa_adapters.vlm.records import registered_vlms

        for name, kind in (("plan", PlanName), ("dtype", DType), ("init", Init)):
            known = get_args(kind)
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        if self.family not in families() and self.family in registered_vlms():
            registered_vlms()[self.family].require("train")
        self._require("family", self.family in families(), f"one of {', '.join(families())}")
        loggers = (*INTEGRATION_TO_CALLBACK, "none")
        self._require("log", self.log in loggers, f"one of {', '.join(loggers)}")
        for name in ("batch_size", "micro_batch", "max_tiles", "max_pixels", "max_new_tokens", "eval_batch"):
            self._whole(name, 1)
        for name in ("save_steps", "save_total_limit", "logging_steps"):
            self._whole(name, 1)
        for name in ("lora_llm", "warmup_steps", "seed", "num_workers", "init_warmup_steps"):
            self._whole(name, 0)
        for name in ("max_steps", "limit", "eval_limit"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        for name in ("lr", "vision_lr", "projector_lr", "llm_lr", "sfa_lr", "epochs", "max_grad_norm", "init_strength"):
            value = getattr(self, name)
            self._require(name, value is None or (_is_number(value) and value > 0), "a number above 0")
        for name in ("weight_decay", "scr_entropy", "scr_grounding", "scr_stability"):
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "a number, at least 0")
        self._require("adat", self.adat is None or (_is_number(self.adat) and 0 < self.adat <= 1), "None or in (0, 1]")
        object.__setattr__(self, "sfa_terms", tuple(self.sfa_terms))
        if self.sfa_layers is not None:
            object.__setattr__(self, "sfa_layers", tuple(self.sfa_layers))
        known = bool(self.sfa_terms) and set(self.sfa_terms) <= set(TERMS)
        self._require("sfa_terms", known, f"some of {', '.join(TERMS)}")
        ramps = self.init == "axial" or not self.init_warmup_steps
        self._require("init_warmup_steps", ramps, f"0 with init={self.init}: only init=axial has a strength that rises")
        starts = self.init == "normal" or not self.sfa or bool({*AXES} & {*self.sfa_terms})
        self._require("init", starts, f"normal with sfa_terms={','.join(self.sfa_terms)}: axial needs row or col")
        self._require("prompt", "{question}" in self.prompt, "a text with {question} in it")
        self._require(
            "freeze_llm", self.freeze_llm or self.plan != "nf4", "true with plan=nf4: 4-bit weights cannot train"
        )
        self._require(
            "batch_size", self.batch_size % self.micro_batch == 0, f"a multiple of micro_batch={self.micro_batch}"
        )

    def replace(self, **changes: Any) -> Self:
        """A variant: the same recipe with other settings.

        Raises:
            RecipeError: A value cannot be used.
        """
        return dataclasses.replace(self, **changes)

    @property
    def folder(self) -> str:
        """Folder of the run: `output` with the name of the recipe filled in."""
        return self.output.replace("{name}", self.name)

    @property
    def image_limit(self) -> int:
        """The most tiles or pixels of an image, whichever its host limits."""
        from sfa_adapters.vlm.records import vlm_spec

        rules = vlm_spec(self.family).images
        return self.max_pixels if rules is not None and rules.setting == "max_pixels" else self.max_tiles

    @property
    def trains_nothing(self) -> bool:
        """Whether every part is frozen and nothing is added."""
        return self.freeze_vision and self.freeze_projector and self.freeze_llm and not (self.sfa or self.lora_llm)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        right = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self._require(name, right, f"a whole number, at least {least}")

    def _require(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise RecipeError(f"{name}={getattr(self, name)!r} must be {wanted}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
