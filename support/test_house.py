"""Who may import whom: tools the nine files and support, the nine files support, support none."""

import ast
import glob
import os
import re

import pytest

from conftest import HERE

NINE = [f"{name}.py" for name in "grid adapters model data train evaluate test_all".split()]


def rooms():
    paths = [os.path.join(HERE, name) for name in NINE]
    paths += glob.glob(f"{HERE}/support/*.py") + glob.glob(f"{HERE}/tools/*.py")
    return sorted(os.path.relpath(path, HERE) for path in paths)


def is_test(path):
    return os.path.basename(path).startswith("test_")


def tree(path):
    with open(os.path.join(HERE, path), encoding="utf-8") as file:
        return ast.parse(file.read())


def floor(module):
    """0 for support, 1 for the nine files, 2 for tools, None for what comes from elsewhere."""
    top = module.split(".")[0]
    if f"{top}.py" in NINE:
        return 1
    return {"support": 0, "tools": 2}.get(top)


def imported_modules(path):
    """The modules that a file imports anywhere, inside functions, too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield node.args[0].value


def upward_imports(path, own_floor):
    modules = imported_modules(path)
    return [module for module in modules if (floor(module) or 0) > own_floor]


@pytest.mark.parametrize("path", [path for path in rooms() if not is_test(path)])
def test_nothing_is_imported_from_an_upper_floor(path):
    own = floor(path.removesuffix(".py").replace(os.sep, "."))
    assert upward_imports(path, own) == []


def test_an_upward_import_inside_a_function_is_seen(tmp_path):
    """The test above can fail."""
    path = tmp_path / "room.py"
    path.write_text("import os\ndef f():\n    if os.name:\n        from model import build_model\n")
    assert upward_imports(str(path), 0) == ["model"] and upward_imports(str(path), 1) == []


def test_the_top_level_holds_the_nine_files_alone():
    names = {os.path.basename(path) for path in glob.glob(f"{HERE}/*.py")}
    assert names - {"conftest.py"} == set(NINE)


def test_the_requirements_are_the_six_packages_and_pytest():
    with open(os.path.join(HERE, "requirements.txt")) as file:
        names = [re.match(r"[\w-]+", line)[0] for line in file]
    assert sorted(names) == sorted("torch torchvision open_clip_torch av numpy tqdm pytest".split())
