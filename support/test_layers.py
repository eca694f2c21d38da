"""Who may import whom: tools all, the nine files support, support neither of the other two."""

import ast
import glob
import os
import re

import pytest

from conftest import HERE

NINE = "grid adapters model data train evaluate test_all".split()
FILES = glob.glob("**/*.py", root_dir=HERE, recursive=True)
MODULES = [path for path in FILES if not re.search(r"(^|/)(test_\w+|conftest)\.py", path)]


def layer(module):
    """0 for support, 1 for the nine files, 2 for tools; 0 for what comes from elsewhere."""
    top = module.split(".")[0]
    return 1 if top in NINE else {"tools": 2}.get(top, 0)


def upward_imports(code, own_layer):
    """What is imported from a higher layer anywhere, inside functions, too."""
    modules = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    return [module for module in modules if layer(module) > own_layer]


@pytest.mark.parametrize("path", MODULES)
def test_nothing_is_imported_from_a_higher_layer(path):
    with open(os.path.join(HERE, path), encoding="utf-8") as file:
        assert upward_imports(file.read(), layer(re.sub(r"\W", ".", path[:-3]))) == []


def test_an_upward_import_inside_a_function_is_seen():
    code = "def f():\n    from model import build_model\n"
    assert upward_imports(code, 0) == ["model"] and upward_imports(code, 1) == []


def test_the_model_needs_no_library_for_videos_or_bars():
    todo, imported = ["model"], set()
    for module in todo:
        imported.add(module)
        path = os.path.join(HERE, module.replace(".", "/") + ".py")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                statements = ast.parse(file.read()).body  # at the top, not inside functions
            for node in statements:
                names = [alias.name for alias in getattr(node, "names", [])]
                names = [node.module] if isinstance(node, ast.ImportFrom) else names
                todo += [name for name in names if name not in todo]
    assert {"adapters", "support.processes", "torch"} < imported
    assert not imported & {"av", "tqdm", "timm"}


def test_the_top_level_holds_the_nine_files_only():
    names = {os.path.basename(path) for path in glob.glob(f"{HERE}/*.py")}
    assert names - {"conftest.py"} == {f"{name}.py" for name in NINE}


def test_the_requirements_are_the_six_packages_and_pytest():
    with open(os.path.join(HERE, "requirements.txt")) as file:
        names = [re.match(r"[\w-]+", line)[0] for line in file]
    assert sorted(names) == sorted("torch torchvision open_clip_torch av numpy tqdm pytest".split())
