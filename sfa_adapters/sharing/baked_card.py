"""The model card of an exported folder: how to load it, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCardData

from sfa_adapters.sharing.metadata import hub_id

__all__ = ["baked_card"]


def baked_card(record: Mapping[str, Any], sizes: str) -> str:
    """The model card of an exported folder, as text.

    Args:
        record: Content of `sfa_bias.json`.
        sizes: Layers and sizes in words.
    """
    base = hub_id(record["base_model"])
    relation: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    data = ModelCardData(library_name="transformers", tags=["sfa", "structural-attention-bias"], **relation)
    revision = f" at revision `{record['base_revision']}`" if record["base_revision"] else ""
    rows, columns = record["grid"]
    height, width = rows * record["patch_size"][0], columns * record["patch_size"][1]
    return f"""---
{data.to_yaml()}
---

# {record["model_class"]} with a structural attention bias

Made from {base or "a local base model"}{revision} by `sfa export` (sfa-adapters {version("sfa-adapters")}). {sizes}.

```python
import sys

sys.path.insert(0, "FOLDER")  # where load_baked.py is; read it first: it is code
from load_baked import load_baked
from transformers import AutoProcessor

model = load_baked("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER/model")
```

It needs torch, transformers {record["versions"]["transformers"]} or a version with the same modules, and safetensors.

## Limits

- `from_pretrained("FOLDER/model")` alone gives the weights without the bias: another, untested model.
- Images reach the tower at {height}x{width} px ({rows}x{columns} patches); another size is an error.
- Attention runs on `sdpa` or `eager`; flash attention takes no bias, and servers with attention of their own
  (vLLM, SGLang) do not apply it.
- The bias is fixed: for further training use the adapter.
"""
