"""Old paths of modules and names. Until 0.2 they give what is at the new place, and warn with the new path.

`MODULES` has the modules that moved. The finder that reads it stands at the end of `sys.meta_path`, behind those that
find what is there. `NAMES` has what left its module or was renamed; `REPLACED` has what is no more, and what to use
instead: importing that is an error that says so. `old_keywords` is for arguments of functions.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, ParamSpec, TypeVar

__all__ = ["MODULES", "NAMES", "REPLACED", "OldMain", "know_old_names", "old_keywords", "old_names", "spec_of"]

P = ParamSpec("P")
T = TypeVar("T")

# Old package, new package, and modules: `old>new`, or one word where the name stayed.
_MOVED = (
    ("", "cli", "cli_analyze>analyze cli_app>app cli_bench>bench cli_calibrate>calibrate cli_density>density"),
    ("", "cli", "cli_errors>errors cli_eval>evaluate cli_quiet>quiet cli_share>share cli_study>study cli_train>train"),
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
_SEARCH = "FoundTower>tower_search.FoundTower find_tower>tower_search.find_tower tower_paths>tower_search.tower_paths "
_GRIDS = (
    "config_grid>pixel_grids.config_grid image_grid>pixel_grids.image_grid pair>pixel_grids.pair "
    "pixel_grid>pixel_grids.pixel_grid pixel_layouts>pixel_grids.pixel_layouts"
)
_RUN = "RunFacts>RunMetadata read_facts>read_run_metadata write_facts>write_run_metadata"
# By the old path of a module: names that are not at its new place, or are called otherwise there, and their new path.
NAMES: Mapping[str, Mapping[str, str]] = {
    _path(old): {
        before: _path(new, now or before) for before, _, now in (word.partition(">") for word in words.split())
    }
    for old, new, words in (
        ("analysis.forward", "eval_mode", "evaluating"),
        ("heads", "heads", "whole>unpruned"),
        ("heads.metadata", "heads.metadata", _PRUNED),
        ("heads.snapshot", "heads.snapshot", "whole>unpruned"),
        ("layout", "block_maps", "default_block_map"),
        ("recipes.analyze", "recipes.analyze.measure", "run_dominance run_entropy run_hallucination run_map"),
        ("recipes.demo", "recipes.demo.run", "FILES DemoConfig DemoError run_demo"),
        ("recipes.demo_options", "recipes.demo.host", "RELOADED load_host reloaded save_trained"),
        ("recipes.own_host", "hosts.user_supplied", "load_own>load_user_model own_prompt>user_prompt"),
        ("reduction.asking", "reduction.fastv.query_rows", "asking_rows>query_rows"),
        ("reduction.image_tokens", "vlm.parts", "Decoder find_decoder image_token_ids"),
        ("registry", "", _SEARCH + _GRIDS),
        ("sharing", "sharing", _RUN),
        ("sharing.run_metadata", "sharing.run_metadata", _RUN),
        ("training.census", "memory.weights", "Census>ParameterCounts take_census>count_parameters"),
        ("training.trainer", "training.train", "FINAL TrainResult train"),
    )
}
# By what names a module is known that has old names, among its attributes.
_PATHS = "__old_paths__"
_STATE = "features_of(model) of sfa_adapters.hooks gives the state of each feature"
_WATCH = "watch_method of sfa_adapters.hooks and watch_input of sfa_adapters.tower_input do this for every feature"
_ATTACH = "attach and detach of sfa_adapters.hooks do this for every feature"
# By the old path of a module: names that nothing of the same use has replaced, and what to use instead.
REPLACED: Mapping[str, Mapping[str, str]] = {
    _path(old): dict.fromkeys(names.split(), text)
    for old, names, text in (
        ("adat.tokenizer", "ADAT_LOG ADAT_STATE", _STATE),
        ("forward_hooks", "add_hook unwatch_forwards", _ATTACH),
        ("heads.kinds", "KINDS", "attention_kinds() gives them, those of other packages too"),
        ("heads.probe", "NUMBERS", "numbers() of sfa_adapters.heads.snapshot gives them"),
        ("lmms_plugin", "MODELS", "models() gives them, those of other packages too"),
        ("recipes.nano_hosts", "FAMILIES", "registered_vlms() of sfa_adapters.vlm.records has them: VLMSpec.nano"),
        ("reduction.dymu_hooks", "MASK", _STATE),
        ("reduction.dymu_tower", "DYMU_STATE INDEX", _STATE),
        ("reduction.fastv_hooks", "FASTV_STATE", _STATE),
        ("reduction.host_tokens", "PackRecorder", _WATCH),
        ("reduction.token_density", "DensityPacker see_images", _WATCH),
        ("reduction.vtu", "LANGUAGE_STATE", _STATE),
        ("registry", "STATE_NAME", _STATE),
        ("tower", "STATE_NAME", _STATE),
        ("training.specs", "check_spec", "VLMSpec.places(model) checks a model"),
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
        sys.modules[old] = import_module(MODULES[old])  # what the import system hands out
        if old in NAMES or old in REPLACED:
            know_old_names(old)

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


def know_old_names(module: str) -> None:
    """Gives a module its `old_names`, out of sight of type checkers, which would let any name pass.

    Args:
        module: Its full name, or an old path of it; a module may be known by several.
    """
    home = vars(sys.modules[module])
    paths = home.setdefault(_PATHS, [])
    if module not in paths:
        paths.append(module)
    home.setdefault("__getattr__", old_names(module))


def old_names(module: str) -> Callable[[str], Any]:
    """`__getattr__` of a module that had other names once.

    Args:
        module: Its full name, or an old path of it; it is being imported.
    """
    home = vars(sys.modules[module])

    def get(name: str) -> Any:
        for path in home.get(_PATHS, [module]):
            new = NAMES.get(path, {}).get(name)
            if new is not None:
                message = f"{path}.{name} has moved to {new}; the old path goes with sfa-adapters 0.2."
                warnings.warn(message, FutureWarning, stacklevel=2)
                package, _, now = new.rpartition(".")
                home[name] = getattr(import_module(package), now)  # so that it warns once
                return home[name]
            text = REPLACED.get(path, {}).get(name)
            if text is not None:  # no AttributeError: `from module import name` would hide its text
                raise ImportError(f"{path}.{name} is no more: {text}.", name=path)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get


def old_keywords(**renamed: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: a function takes keywords by their old names, too, and warns; its signature shows the new ones only.

    Args:
        **renamed: New name by old name.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for old in renamed.keys() & kwargs.keys():
                new = renamed[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got {new!r}, and {old!r}, which is its old name.")
                message = f"{function.__name__}({old}=...) is {new}=... now; the old name goes with sfa-adapters 0.2."
                warnings.warn(message, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


class OldMain(ModuleType):
    """Makes the module `sfa_adapters.cli.main` callable like its function `main`.

    The program `sfa` of an older installation calls `main` of `sfa_adapters.cli`, which was the function.
    """

    def __call__(self, arguments: list[str] | None = None) -> None:
        """As `sfa_adapters.cli.main.main`."""
        message = "The program `sfa` was installed before sfa_adapters.cli became a package. Install it again."
        warnings.warn(message, FutureWarning, stacklevel=2)
        self.main(arguments)
