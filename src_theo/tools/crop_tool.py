"""The documented import: from tools.crop_tool import CropTool"""

from ovis25.tools import CropTool

__all__ = ["CropTool"]
