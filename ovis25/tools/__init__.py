"""Tools that a model may call while it answers."""

from collections.abc import Iterable

from ovis25.tools.base import Tool, Toolbox, ToolError, tool_result
from ovis25.tools.crop import CropTool

__all__ = ["CropTool", "Tool", "ToolError", "Toolbox", "tool_result", "toolbox"]

BUILT_IN = {CropTool.name: CropTool}


def toolbox(names: Iterable[str] = tuple(BUILT_IN)) -> Toolbox:
    """The built-in tools of these names, all by default. Raises ValueError for an unknown one."""
    names = list(names)
    if unknown := [name for name in names if name not in BUILT_IN]:
        raise ValueError(f"there is no tool {', '.join(unknown)}; the built-in tools are {', '.join(BUILT_IN)}")
    return Toolbox(BUILT_IN[name]() for name in names)
