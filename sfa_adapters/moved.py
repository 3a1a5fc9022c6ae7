"""Old paths of modules and old names in them. They work until 0.2, and warn with the new path.

One table of modules and one of names. The finder of old modules is the last one in `sys.meta_path`, so that it is asked
only for modules that do not exist. `old_names` serves the names that a module had before.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MODULES", "NAMES", "OldMain", "old_names", "spec_of"]

# Old package, new package, and modules: `old>new`, or one word where the name stayed.
_MOVED = (
    ("training", "", "folders>files"),
    ("training", "hosts", "prepare pruned recipe settings four_bit>quantization hosts>load plans>placement specs>spec"),
    ("training", "hosts", "table>summary"),
    ("training", "data", "evidence collate>collator columns>rows local>local_files pages>preprocess"),
    ("training", "data", "prompt>chat_template questions>datasets rows>open_rows tables>sources"),
    ("training", "memory", "activations census>weights memory>predict memory_plan>report sizes>shapes"),
    ("training", "training", "engine>trainer"),
    ("reduction", "reduction", "kept>kept_tokens"),
    ("reduction", "reduction.dymu", "cache_record calibrate host_tokens logical_rope merging size_attention vtu"),
    ("reduction", "reduction.dymu", "dymu_config>config dymu_hooks>hooks dymu_tokens>tokens dymu_tower>tower"),
    ("reduction", "reduction.fastv", "prompt selectors token_density asking>query_rows fastv_hooks>hooks"),
    ("reduction", "reduction.fastv", "fastv_input>prune_at_input"),
    ("heads", "heads", "facts>metadata probe>snapshot"),
    ("sharing", "sharing", "facts>run_metadata"),
    ("recipes", "hosts", "own_host>user_supplied"),
    ("recipes", "recipes.nano", "encode evaluate finetune many_heads packing pretrain teacher_forcing"),
    ("recipes", "recipes.nano", "nano_checkpoint>checkpoint nano_hosts>hosts nano_words>tokenizer"),
    ("recipes", "recipes.synthetic", "charts fonts korean legible pages plots questions rendered_rows scans sheet"),
    ("recipes", "recipes.synthetic", "table_pages table_pictures tables data>chart_questions render>rendering"),
    ("recipes", "recipes.synthetic", "sources>real_tables"),
    ("recipes", "recipes.analyze", "attention_study predictions token_budgets tokens_report"),
    ("recipes", "recipes.bench", "heads_figure heads_quality heads_report bench_heads>heads bench_tokens>tokens"),
    ("recipes", "recipes.bench", "bench_figure>tokens_figure bench_quality>tokens_quality devices>device"),
    ("recipes", "recipes.calibrate", "calibrate_dymu>dymu calibrate_heads>heads"),
    ("recipes", "recipes.demo", "answer_page demo_charts>charts demo_options>options demo_report>report"),
    ("recipes", "recipes.demo", "demo_tables>tables demo_tables_figures>tables_figures"),
    ("recipes", "recipes.demo", "demo_tables_report>tables_report"),
    ("recipes", "recipes.density", "density_data>labelled_pages density_map>map train_density>train"),
    ("recipes", "recipes.studies", "shuffled_places"),
)


def _path(*parts: str) -> str:
    return ".".join(part for part in (__package__, *parts) if part)


MODULES: Mapping[str, str] = {
    _path(old_package, old): _path(new_package, new or old)
    for old_package, new_package, words in _MOVED
    for old, _, new in (word.partition(">") for word in words.split())
}
_PRUNED = (
    "PrunedFacts>PrunedMetadata folder_facts>folder_metadata plan_facts>plan_metadata pruned_facts>pruned_metadata"
)
_RUN = "RunFacts>RunMetadata read_facts>read_run_metadata write_facts>write_run_metadata"
# Names that a module no longer has: where they are now, as `name` or `old>new`.
NAMES: Mapping[str, Mapping[str, str]] = {
    _path(old): {name: _path(new, to or name) for name, _, to in (word.partition(">") for word in words.split())}
    for old, new, words in (
        ("heads", "heads", "whole>unpruned"),
        ("heads.metadata", "heads.metadata", _PRUNED),
        ("heads.snapshot", "heads.snapshot", "whole>unpruned"),
        ("recipes.analyze", "recipes.analyze.measure", "run_dominance run_entropy run_hallucination run_map"),
        ("recipes.demo", "recipes.demo.run", "FILES DemoConfig DemoError run_demo"),
        ("sharing", "sharing", _RUN),
        ("sharing.run_metadata", "sharing.run_metadata", _RUN),
        ("training.trainer", "training.train", "FINAL TrainResult train"),
    )
}


def _warn(old: str, new: str) -> None:
    message = f"{old} has moved to {new}; the old path goes with sfa-adapters 0.2."
    warnings.warn(message, FutureWarning, stacklevel=3)


class _OldPath:
    """Loads the module at its new place."""

    def create_module(self, spec: ModuleSpec) -> None:
        """An empty module, which never comes to light."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        _warn(old, MODULES[old])
        sys.modules[old] = import_module(MODULES[old])  # what the import system hands out

    def get_code(self, name: str) -> CodeType:
        """For `python -m`."""
        from importlib.util import find_spec

        _warn(name, MODULES[name])
        spec: Any = find_spec(MODULES[name])
        return spec.loader.get_code(MODULES[name])


def spec_of(name: str) -> ModuleSpec | None:
    """How to load a module of this old path; None where it is none.

    Args:
        name: Full name of a module.
    """
    if name not in MODULES:
        return None
    file = Path(__file__).parent.joinpath(*MODULES[name].split(".")[1:]).with_suffix(".py")
    return ModuleSpec(name, _OldPath(), origin=str(file))  # pyright: ignore[reportArgumentType]


def old_names(module: str) -> Callable[[str], Any]:
    """`__getattr__` of a module that no longer has some of its names, or stands in the place of one that had them.

    Args:
        module: Its full name.
    """

    def get(name: str) -> Any:
        new = NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} has moved to {new}; the old path goes with sfa-adapters 0.2."
        warnings.warn(message, FutureWarning, stacklevel=2)
        package, _, new_name = new.rpartition(".")
        value = getattr(import_module(package), new_name)
        setattr(sys.modules[module], name, value)  # so that it warns once
        return value

    return get


class OldMain(ModuleType):
    """The module `sfa_adapters.cli.main`, callable like its function.

    The program `sfa` of an installation from before calls `main` of `sfa_adapters.cli`, which was the function.
    """

    def __call__(self, arguments: list[str] | None = None) -> None:
        """As `sfa_adapters.cli.main.main`."""
        message = "The program `sfa` was installed before sfa_adapters.cli became a package. Install it again."
        warnings.warn(message, FutureWarning, stacklevel=2)
        self.main(arguments)
