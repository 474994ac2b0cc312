"""Tools by name: the built-in ones, and a user's own as `package.module:Name`."""

import importlib
from collections.abc import Iterable

from ovis25.text import nearest, shorten
from ovis25.tools.base import Tool, Toolbox
from ovis25.tools.crop import CropTool

BUILT_IN = {CropTool.name: CropTool}


def toolbox(names: Iterable[str] = tuple(BUILT_IN)) -> Toolbox:
    """The built-in tools of these names, all by default. Raises ValueError for an unknown one."""
    names = list(names)
    if unknown := [name for name in names if name not in BUILT_IN]:
        raise ValueError(f"there is no tool {', '.join(unknown)}; the built-in tools are {', '.join(BUILT_IN)}")
    return Toolbox(BUILT_IN[name]() for name in names)


def as_toolbox(tools: Toolbox | Iterable[Tool] | None) -> Toolbox:
    """Tools as a toolbox; None are the built-in ones. Raises ValueError where two share a name."""
    if tools is None:
        return toolbox()
    return tools if isinstance(tools, Toolbox) else Toolbox(tools)


def load_tools(names: Iterable[str]) -> Toolbox:
    """Built-in tools by their name, and own ones as `package.module:Name`: a class that is made without arguments, or a
    tool that is made already. This imports the module, so names must come from whoever starts the run.

    Raises:
        ValueError: there is no such tool, or it is none: says which name and what it lacks.
    """
    return Toolbox(BUILT_IN[name]() if name in BUILT_IN else _load(name) for name in names)


def _load(name: str) -> Tool:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        near = nearest(name, BUILT_IN)
        hint = f"did you mean {near}" if near else f"the built-in tools are {', '.join(BUILT_IN)}"
        raise ValueError(f"there is no tool {shorten(name)}; {hint}; your own are written package.module:Name")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        tool = found() if isinstance(found, type) else found
    except Exception as error:
        # a module is anybody's code: whatever it raises, it cannot be used
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"the tool {shorten(name)} cannot be made: {problem}; its package must be installed, or its folder named "
            "in PYTHONPATH"
        ) from error
    lacking = [part for part in ("name", "description", "usage") if not isinstance(getattr(tool, part, None), str)]
    lacking += [] if callable(getattr(tool, "run", None)) else ["run(arguments, images)"]
    if lacking:
        raise ValueError(f"the tool {shorten(name)} lacks {', '.join(lacking)}; see docs/inference.md, Tools")
    return tool
