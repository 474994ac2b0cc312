"""The house rules that imports can show: layers point down, optional packages have one owner, nothing is hidden."""

import ast
import graphlib
from pathlib import Path

import pytest

import ovis25

PACKAGE = Path(ovis25.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer (a folder, or a file beside them) and the layers it may import. CONTRIBUTING.md explains the table.
LOWEST = {
    "checkpoint", "compat", "constants", "errors", "files", "options", "ranks", "reduced", "signatures", "text",
    "tokenizer_files", "weights",
}  # fmt: skip
LAYERS = {
    "compat": set(),
    "constants": set(),
    "errors": set(),
    "ranks": set(),
    "reduced": set(),
    "signatures": set(),
    "text": set(),
    "options": {"text"},
    "files": {"constants", "text"},
    "checkpoint": {"constants", "errors", "files", "text"},
    "weights": {"checkpoint"},
    "tokenizer_files": {"checkpoint", "constants"},
    "reports": set(),
    "launch": set(),
    "processing": LOWEST,
    "model": LOWEST,
    "tools": LOWEST,
    "data": {*LOWEST, "processing", "tools"},
    "evaluate": {*LOWEST, "data"},
    "tiny": {*LOWEST, "data", "model", "processing"},
    "loading": {*LOWEST, "model", "processing", "tiny"},
    "generate": {*LOWEST, "model", "processing", "tools"},
    "inference": {*LOWEST, "generate", "loading", "model", "processing", "tools"},
    "merge": {*LOWEST, "loading", "model", "processing"},
    "training": {*LOWEST, "data", "loading", "model", "processing", "reports", "tools"},
    "cli": {
        *LOWEST,
        "__init__",
        "data",
        "evaluate",
        "generate",
        "inference",
        "merge",
        "processing",
        "tools",
        "training",
    },
    "registration": {"model", "processing"},
    "auto_hook": {"registration"},
    # the door `from ovis25 import ...`
    "__init__": {"auto_hook", "inference", "model", "processing"},
}
OPTIONAL = ("av", "bitsandbytes", "deepspeed", "matplotlib", "peft", "trl")
# What the package does without.
FORBIDDEN = ("flash_attn", "torchvision")


def is_layer(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def imports(file: Path) -> list[tuple[str, ast.stmt]]:
    """Every module that a file imports, and where; what `import_module` gets is one too.

    `from ovis25 import model` counts as `ovis25.model`, `from ovis25 import __version__` as `ovis25.__init__`.
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
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(name, node) for name in _named(node.args[0])]
    return found


def module_of(file: Path) -> str:
    return ".".join(("ovis25", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def modules_behind(file: Path) -> set[str]:
    """The modules of this package that a file names in imports, those for type checkers alone included, and in
    `import_module("...")`.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return found & MODULES.keys()


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, each importing the one before it; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def _named(argument: ast.expr) -> list[str]:
    """What `import_module` gets where that stands there: a text, or one that begins with a package of ours."""
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    return [argument.value] if isinstance(argument, ast.Constant) else []


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


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: modules_behind(file) - {name} for name, file in MODULES.items()}
    assert len(graph) > 100 and graph["ovis25.data.dataset"] > {"ovis25.data.survey", "ovis25.tools"}
    assert "ovis25.training.trl" in graph["ovis25.training.build"], "import_module counts"
    assert not (circle := circle_in(graph)), f"imports in a circle: {' <- '.join(circle)}"
    graph["ovis25.data.errors"].add("ovis25.data.dataset")
    assert {"ovis25.data.errors", "ovis25.data.dataset"} <= {*circle_in(graph)}, "and one would be seen"


@pytest.mark.parametrize("file", sorted((PACKAGE / "data").rglob("*.py")), ids=relative)
def test_data_has_short_files_and_functions(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 300, f"{relative(file)} is too long to be read at once"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{relative(file)}:{node.lineno}: {node.name} is too long"


def test_the_embedded_model_is_known_to_loading_alone_and_knows_the_digits_alone():
    for file in FILES:
        modules = [module for module, _ in imports(file)]
        if layer_of(file) == "tiny":
            data = [module for module in modules if module.startswith("ovis25.data")]
            assert all(module.startswith("ovis25.data.digits") for module in data), relative(file)
        elif relative(file) != "loading.py":
            assert not [module for module in modules if module.startswith("ovis25.tiny")], relative(file)


def test_plotting_is_loaded_only_when_curves_are_drawn():
    for file in FILES:
        eager = [module for module, node in imports(file) if not isinstance(node, ast.Call)]
        if layer_of(file) != "reports":
            assert not [module for module in eager if module.startswith(("ovis25.reports", "matplotlib"))], relative(
                file
            )


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
def test_private_names_of_dependencies_stand_in_compat_alone(file):
    if relative(file) == "compat.py":
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    foreign = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OWN_NAMES
    ]
    foreign += [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and any(map(is_private, (*node.module.split("."), *(alias.name for alias in node.names))))
    ]
    assert not foreign, f"{relative(file)}: what must stay goes through ovis25/compat.py: {foreign}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def own_names() -> set[str]:
    """Private names that the package itself gives: functions, classes, attributes that it sets."""
    found = set()
    for node in (node for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


# the public methods of named tuples begin so
DOCUMENTED = {"_replace"}
OWN_NAMES = own_names()


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_bare_except(file):
    handlers = [
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ExceptHandler)
    ]
    assert not [node.lineno for node in handlers if node.type is None]
