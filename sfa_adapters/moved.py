"""Old import paths of modules, which keep working until 0.2: they import the module at its new path, with a warning.

One table. The finder that reads it is the last one in `sys.meta_path`, after those that find existing modules. Where
the old path belongs to another module or package now, `old_names` serves the names that were there.
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
# Names of old modules whose path is another module or a package now.
NAMES: Mapping[str, Mapping[str, str]] = {
    _path(old): dict.fromkeys(names.split(), _path(new))
    for old, new, names in (
        ("recipes.analyze", "recipes.analyze.measure", "run_dominance run_entropy run_hallucination run_map"),
        ("recipes.demo", "recipes.demo.run", "FILES DemoConfig DemoError run_demo"),
        ("training.trainer", "training.train", "FINAL TrainResult train"),
    )
}


def _warn(old: str, new: str) -> None:
    message = f"{old} has moved to {new}; the old path goes with sfa-adapters 0.2."
    warnings.warn(message, FutureWarning, stacklevel=3)


class _OldPath:
    """Loader of an old path: imports the module at its new path."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves it to the import system to make a module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        _warn(old, MODULES[old])
        sys.modules[old] = import_module(MODULES[old])  # the import system returns what is in here

    def get_code(self, name: str) -> CodeType:
        """The code of the module at its new path, for `python -m`."""
        from importlib.util import find_spec

        _warn(name, MODULES[name])
        spec: Any = find_spec(MODULES[name])
        return spec.loader.get_code(MODULES[name])


def spec_of(name: str) -> ModuleSpec | None:
    """The import spec of an old path; None where it is not one.

    Args:
        name: Full name of a module.
    """
    if name not in MODULES:
        return None
    file = Path(__file__).parent.joinpath(*MODULES[name].split(".")[1:]).with_suffix(".py")
    return ModuleSpec(name, _OldPath(), origin=str(file))  # pyright: ignore[reportArgumentType]


def old_names(module: str) -> Callable[[str], Any]:
    """`__getattr__` of a module in whose place another one was, which had names that it does not have.

    Args:
        module: Its full name.
    """

    def get(name: str) -> Any:
        new = NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} has moved to {new}.{name}; the old path goes with sfa-adapters 0.2."
        warnings.warn(message, FutureWarning, stacklevel=2)
        value = getattr(import_module(new), name)
        setattr(sys.modules[module], name, value)  # so that it warns once
        return value

    return get


class OldMain(ModuleType):
    """Makes the module `sfa_adapters.cli.main` callable like its function `main`.

    The program `sfa` of an older installation calls `main` of `sfa_adapters.cli`, which was the function.
    """

    def __call__(self, arguments: list[str] | None = None) -> None:
        """As `sfa_adapters.cli.main.main`."""
        message = "The program `sfa` was installed before sfa_adapters.cli became a package. Install it again."
        warnings.warn(message, FutureWarning, stacklevel=2)
        self.main(arguments)
