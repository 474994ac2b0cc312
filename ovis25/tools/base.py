"""What a tool is, and the registry that runs what the model asked for."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from PIL import Image

from ovis25.text import shorten


class ToolError(ValueError):
    """A call that cannot be done; the message is for the model and says the cure."""


class Tool(Protocol):
    """`name`: the first word of a call; `description`: one sentence; `usage`: how a call looks."""

    name: str
    description: str
    usage: str

    def run(self, arguments: str, images: Sequence[Image.Image]) -> Image.Image | str:
        """`arguments`: the call after the name; `images`: the request's, then the crops so far. Raises ToolError."""
        ...


class Toolbox:
    """The tools a model may call. Raises ValueError where two share a name."""

    def __init__(self, tools: Iterable[Tool]):
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise ValueError(f"two tools are named {tool.name}")
            self.tools[tool.name] = tool

    def run(self, call: str, images: Sequence[Image.Image]) -> Image.Image | str:
        """Run the text between `<tool_call>` and `</tool_call>`. What goes wrong becomes a text for the model."""
        try:
            return self.run_strictly(call, images)
        except ToolError as error:
            return f"Error: {error}"

    def run_strictly(self, call: str, images: Sequence[Image.Image]) -> Image.Image | str:
        """As `run`, but raises ToolError."""
        name, _, arguments = call.strip().partition(" ")
        if name not in self.tools:
            raise ToolError(f"there is no tool {shorten(name)}; the tools are {', '.join(self.tools) or 'none'}")
        return tool_result(name, self.tools[name].run, arguments, images)

    def describe(self) -> str:
        """Lines for a system prompt: each tool's sentence and how it is called."""
        return "\n".join(
            f"{t.name}: {t.description} Call it as <tool_call>{t.usage}</tool_call>." for t in self.tools.values()
        )


def tool_result(
    name: str, run: Callable[[str, Sequence[Image.Image]], Image.Image | str], call: str, images: Sequence[Image.Image]
) -> Image.Image | str:
    """What a tool gives.

    Raises:
        ToolError: whatever went wrong inside it, or its result is neither a picture nor a text.
    """
    try:
        result = run(call, images)
    except ToolError:
        raise
    except Exception as error:
        # a tool is anybody's code: what it raises ends its call, not the replies beside it
        raise ToolError(f"{name} failed: {type(error).__name__}: {shorten(str(error), 200)}") from error
    if not isinstance(result, (Image.Image, str)):
        raise ToolError(f"{name} gave a {type(result).__name__}, neither a picture nor a text")
    return result
