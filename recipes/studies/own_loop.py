"""The `pretrained` study as a user-written training loop: twenty lines of torch that reach the study's score.

    python -m sfa_adapters.recipes.studies.own_loop

The training code of the study is not used. DINOv2-small, its last three layers and two linear heads learn to answer
along rows and columns of rendered tables, with the axial start. Takes about five minutes on two cores.
"""

from __future__ import annotations

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from sfa_adapters import SFAConfig, calibrate_axial, inject_sfa, largest_scalars, sfa_parameter_groups
from sfa_adapters.recipes.studies.dinov2 import dinov2_tower
from sfa_adapters.recipes.studies.pretrained import TEST
from sfa_adapters.recipes.studies.pretrained_pictures import KINDS, draw_pictures
from sfa_adapters.recipes.studies.training import NONE, picture_scores

__all__ = ["own_loop"]

LAYERS = range(9, 12)  # of twelve


def own_loop(steps: int = 160, pictures: int = 800, tests: int = 200, seed: int = 0) -> tuple[float, dict[str, float]]:
    """Trains and evaluates DINOv2-small with SFA on rendered tables.

    Args:
        steps: Steps of 8 pictures.
        pictures: Training pictures.
        tests: Test pictures.
        seed: Of heads, scalars and order.

    Returns:
        The share of right answers on the test pictures of the study, and the largest scalars in logits.
    """
    torch.manual_seed(seed)
    order = torch.arange(pictures)
    tower, pages = dinov2_tower(), draw_pictures("rendered", "train", range(pictures), 1)

    # ---- what a user writes ------------------------------------------------------------------------------------
    tower.requires_grad_(False).encoder.layer[LAYERS.start :].requires_grad_(True)
    chosen = calibrate_axial(tower, pages.pixels[:16], layers=LAYERS)
    inject_sfa(tower, SFAConfig(init="axial", init_heads=chosen, layers_to_transform=list(LAYERS)))
    header, content = torch.nn.Linear(384, 2 * KINDS), torch.nn.Linear(384, KINDS)
    heads = {"params": [*header.parameters(), *content.parameters()], "lr": 4e-3}
    optimizer = torch.optim.AdamW([*sfa_parameter_groups(tower, lr=2e-4), heads], betas=(0.9, 0.98))
    weights = [group for group in optimizer.param_groups if group.get("name") != "sfa"]  # scalars are not clipped
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 8, steps)
    for step in range(steps):
        if step % (pictures // 8) == 0:
            order = torch.randperm(pictures)
        batch = order[step % (pictures // 8) * 8 :][:8]
        states = tower(pixel_values=pages.pixels[batch]).last_hidden_state[:, 1:]
        loss = cross_entropy(header(states).view(-1, KINDS), pages.headers[batch].flatten(), ignore_index=NONE)
        side = cross_entropy(content(states).view(-1, KINDS), pages.content[batch].flatten(), ignore_index=NONE)
        (loss + side / 2).backward()
        torch.nn.utils.clip_grad_norm_([p for group in weights for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    # ------------------------------------------------------------------------------------------------------------
    test = draw_pictures("rendered", "test", range(tests), TEST)
    with torch.no_grad():
        states = torch.cat([tower(pixel_values=part).last_hidden_state[:, 1:] for part in test.pixels.split(50)])
        answers = header(states).unflatten(-1, (2, KINDS)).argmax(-1)
    return float(picture_scores(answers, test.headers).mean()), largest_scalars(tower)


if __name__ == "__main__":
    score, scalars = own_loop()
    largest = ", ".join(f"{term} {value:.1f}" for term, value in scalars.items())
    Console().print(f"{100 * score:.1f}% of the answers are right; largest scalars, logits: {largest}")
