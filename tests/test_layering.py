"""Imports go down the list of rooms only, and in no circle; config objects stop at `assembly.py`."""

import ast
import graphlib
import pathlib

from support.paths import ROOT

# From the top: a module imports from its own row and those below. All that is not named is the last row.
ROWS = [
    ["commands", "cli", "command_line", "completion", "__main__"],
    ["sweep", "benchmarks", "compile", "plots"],
    ["tokenizer_training"],
    ["training"],
    ["evaluation"],
    ["interop"],
    ["generation"],
    ["assembly"],
    ["training.state", "training.optimizer", "training.ema"],  # what an assembly is made of
    ["config", "workdir"],
    ["checkpoints"],
    ["models"],
    ["heads"],
    ["tokenizers"],
    ["nn"],
    ["data"],
]


def modules():
    files = sorted((ROOT / "marjax").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: pathlib.Path, known):
    """The modules of ours that a file imports anywhere, in functions and for annotations too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
    return found & known.keys()


def row(module):
    parts = module.split(".")[1:]
    for name in (".".join(parts), parts[0] if parts else ""):
        for number, rooms in enumerate(ROWS):
            if name in rooms:
                return number
    return len(ROWS)


def test_imports_go_down_and_not_in_circles():
    known = modules()
    graph = {module: imports(path, known) - {"marjax"} for module, path in known.items() if module != "marjax"}
    assert len(graph) > 150
    up = [f"{module} imports {each}" for module, found in graph.items() for each in found if row(each) < row(module)]
    assert not up
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_config_objects_stop_at_the_assembly():
    below = ROWS.index(["assembly"])
    allowed = ROWS.index(["config", "workdir"])
    found = [
        module
        for module, path in modules().items()
        if row(module) > below and row(module) != allowed and "ConfigDict" in path.read_text()
    ]
    assert not found
