"""Tools that a model may call while it answers."""

from ovis25.tools.base import Tool, Toolbox, ToolError, tool_result
from ovis25.tools.crop import CropTool
from ovis25.tools.named import BUILT_IN, as_toolbox, load_tools, toolbox

__all__ = [
    "BUILT_IN",
    "CropTool",
    "Tool",
    "ToolError",
    "Toolbox",
    "as_toolbox",
    "load_tools",
    "tool_result",
    "toolbox",
]
