"""Registration with transformers' Auto classes, without importing transformers for it.

`import ovis25` shall be quick, and `AutoProcessor.from_pretrained` shall know the model after it. So where the Auto
classes are imported already, the model is registered at once; else a finder in `sys.meta_path` waits for them. It finds
nothing by itself: for modules of transformers and ours it asks the other finders, and counts how many of these modules
are being executed. When none is any more, and the Auto classes are among what was loaded, it registers the model and
goes away. Not earlier: registering imports the model, which imports much of transformers, and neither may be half done.
"""

import functools
import importlib
import sys
import threading
from importlib.machinery import ModuleSpec

_WATCHED = ("transformers", "ovis25")
# whichever of them is imported first, the others can be imported then
_AUTO_MODULES = tuple(f"transformers.models.auto.{name}_auto" for name in ("configuration", "modeling", "processing"))


def register_with_transformers() -> None:
    """Register now, or as soon as transformers' Auto classes are imported."""
    if _is_auto_loaded():
        importlib.import_module("ovis25.registration")
    else:
        sys.meta_path.insert(0, _Waiting())


def _is_auto_loaded() -> bool:
    return any(name in sys.modules for name in _AUTO_MODULES)


class _Waiting:
    """A finder of the import system; each thread counts the modules that it is executing."""

    def __init__(self):
        self.executing = threading.local()

    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        """What the other finders say, with a loader that counts."""
        if name.partition(".")[0] not in _WATCHED:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            # on this module's loader alone: it stays of its class, with all that others ask of it
            spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)
        return spec

    def _execute(self, execute, module) -> None:
        self.executing.number = getattr(self.executing, "number", 0) + 1
        try:
            execute(module)
        finally:
            self.executing.number -= 1
        if not self.executing.number and _is_auto_loaded() and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module("ovis25.registration")
