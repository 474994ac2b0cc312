"""The house rules that imports can show: layers point down, optional packages have one owner, nothing is hidden."""

import ast
from pathlib import Path

import pytest

import ovis25

PACKAGE = Path(ovis25.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer (a folder, or a file beside them) and the layers it may import. CONTRIBUTING.md explains the table.
LOWEST = {"constants", "checkpoint", "files", "reduced", "text", "tokenizer_files", "weights"}
LAYERS = {
    "constants": set(),
    "text": set(),
    "reduced": set(),
    "files": {"constants", "text"},
    "checkpoint": {"constants", "files", "text"},
    "weights": {"checkpoint"},
    "tokenizer_files": {"checkpoint", "constants"},
    "processing": LOWEST,
    "model": LOWEST,
    "tools": LOWEST,
    "data": {*LOWEST, "processing", "tools"},
    "tiny": {*LOWEST, "model", "processing"},
    "training": {*LOWEST, "data", "model", "processing", "tiny", "tools"},
    "loading": {*LOWEST, "model", "processing", "tiny"},
    "generate": {*LOWEST, "model", "processing", "tools"},
    "inference": {*LOWEST, "generate", "loading", "model", "processing", "tiny", "tools"},
    "merge": {*LOWEST, "loading", "model", "processing", "tiny"},
    "cli": {*LOWEST, "__init__", "data", "inference", "merge", "model", "processing", "tiny", "tools", "training"},
    # the door `from ovis25 import ...`, which registers with transformers too
    "__init__": {"inference", "model", "processing"},
    "__main__": {"cli"},
}
OPTIONAL = ("av", "bitsandbytes", "deepspeed", "matplotlib", "peft", "trl")
# What the package does without.
FORBIDDEN = ("flash_attn", "torchvision")


def is_layer(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def imports(file: Path) -> list[tuple[str, ast.stmt]]:
    """Every module that a file imports, with the statement; `from ovis25 import model` counts as `ovis25.model`,
    `from ovis25 import __version__` as `ovis25.__init__`.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            if node.module == "ovis25":
                found += [
                    (f"ovis25.{alias.name if is_layer(alias.name) else '__init__'}", node) for alias in node.names
                ]
            else:
                found.append((node.module, node))
    return found


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def relative(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_point_down(file):
    layer = layer_of(file)
    assert layer in LAYERS, f"{layer} is in no row of the layer table"
    for module, node in imports(file):
        if module.split(".")[0] == "ovis25":
            target = module.split(".")[1]
            assert target == layer or target in LAYERS[layer], (
                f"{relative(file)}:{node.lineno}: {layer} must not import {target}"
            )


def test_the_table_itself_has_no_cycle():
    done = set()
    while len(done) < len(LAYERS):
        ready = {layer for layer, targets in LAYERS.items() if layer not in done and targets <= done}
        assert ready, f"a cycle among {set(LAYERS) - done}"
        done |= ready


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_import_stands_inside_a_function(file):
    for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            hidden = [node.lineno for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert not hidden, f"{relative(file)}: imports inside a function, lines {hidden}"


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_dependency_has_one_owner(package):
    owners = {relative(file) for file in FILES for module, _ in imports(file) if module.split(".")[0] == package}
    assert len(owners) <= 1, f"{package} is imported in {sorted(owners)}"


def test_the_package_needs_neither_flash_attention_nor_torchvision():
    for file in FILES:
        assert not {module.split(".")[0] for module, _ in imports(file)} & set(FORBIDDEN), relative(file)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_bare_except(file):
    handlers = [
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ExceptHandler)
    ]
    assert not [node.lineno for node in handlers if node.type is None]
