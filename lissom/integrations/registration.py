"""Makes Lissom known to transformers and Sentence Transformers, whichever of them and Lissom is imported first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Watcher(MetaPathFinder):
    """Calls a function once after the import of each of some modules. Looking a module up does not call it."""

    def __init__(self, actions: Mapping[str, Callable[[], None]]) -> None:
        self._actions = dict(actions)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((candidate for finder in others if (candidate := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            self._run_after_import(spec.loader, name)
        return spec

    def _run_after_import(self, loader: Loader, name: str) -> None:
        """Let the loader call the module's action when it has run the module."""
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            action = self._actions.pop(name, None)
            if action is not None:
                action()

        loader.exec_module = exec_module


def after_import(actions: Mapping[str, Callable[[], None]]) -> None:
    """Call each action when its module is imported; now, if it is imported already."""
    waiting = {name: action for name, action in actions.items() if name not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _Watcher(waiting))
    for name in actions.keys() - waiting.keys():
        actions[name]()


def _register_config() -> None:
    importlib.import_module("lissom.integrations.transformers.auto_model").register_config()


def _register_models() -> None:
    importlib.import_module("lissom.integrations.transformers.auto_model").register_models()


def _register_exporter() -> None:
    # A version of a library with other classes is imported as if Lissom were not here; so below.
    with suppress(ImportError):
        importlib.import_module("lissom.integrations.transformers.exporters")


def _register_sentence_models() -> None:
    with suppress(ImportError):
        importlib.import_module("lissom.integrations.sentence_transformers.sentence_models")


def register_with_libraries() -> None:
    """Register saved models with the Auto classes of transformers and with Sentence Transformers, the backend of transformers'
    exporters, and how models of Sentence Transformers are compiled. Neither library is imported for it."""
    after_import(
        {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_models,
            "transformers.exporters.auto": _register_exporter,
            "sentence_transformers": _register_sentence_models,
        }
    )
