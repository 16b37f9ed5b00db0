"""The house keeps its order: one direction of imports, one home for every name, real types."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A room imports from rooms of a lower floor, and from itself.
FLOORS = {
    "cli": 9,
    "bench": 8,
    "hub": 7,
    "converters": 7,
    "training": 6,
    "evaluation": 5,
    "planning": 5,
    "checkpoints": 4,
    "data": 3,
    "settings": 2,
    "petra": 1,
    "models": 1,
    "reversible": 0,
}


def _modules() -> dict[str, Path]:
    """Every file of the package by its module's name; converters/ is installed inside the package."""
    own = [path for path in (ROOT / "petra_zoo").rglob("*.py") if "converters" not in path.parts]
    paths = {path.relative_to(ROOT): path for path in own}
    paths |= {Path("petra_zoo", path.relative_to(ROOT)): path for path in (ROOT / "converters").rglob("*.py")}
    return {".".join(place.with_suffix("").parts).removesuffix(".__init__"): paths[place] for place in sorted(paths)}


FILES = _modules()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imports(module: str) -> set[str]:
    """The modules of the package that one imports anywhere in its text, in functions and for types too."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("petra_zoo"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("petra_zoo.")}
    return found - {module}


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_a_room_imports_from_lower_floors_only() -> None:
    upward = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports(module)
        if {room(module), room(other)} <= FLOORS.keys()
        if room(module) != room(other) and FLOORS[room(module)] <= FLOORS[room(other)]
    ]
    assert not upward


def test_no_two_modules_import_each_other() -> None:
    reaches = {module: imports(module) for module in FILES if not FILES[module].name == "__init__.py"}
    order: list[str] = []
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == 2 or module not in reaches:
            return
        assert state.get(module) != 1, " -> ".join((*path[path.index(module) :], module))
        state[module] = 1
        for other in sorted(reaches[module]):
            visit(other, (*path, module))
        state[module] = 2
        order.append(module)

    for module in reaches:
        visit(module, ())
    assert len(order) == len(reaches)


def test_a_public_name_has_one_home() -> None:
    homes = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if room(module) != "cli":  # commands are called like what they do
                    homes[node.name].append(module)
    doubles = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not doubles


def test_no_package_gives_a_name_of_one_of_its_modules() -> None:
    for module, tree in TREES.items():
        if FILES[module].name == "__init__.py":
            below = [name.rpartition(".") for name in FILES]
            modules = {name for package, _, name in below if package == module}
            imported = {name.rpartition(".")[2] for name in imports(module) if name.rpartition(".")[0] == module}
            given = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
            assert not (given & modules) - imported, module


def test_types_are_real() -> None:
    """`Any` is for what torch or timm leave untyped; nothing else that a type checker passes over."""
    text = {path: path.read_text(encoding="utf-8").splitlines() for path in FILES.values()}
    lines = [line for path in text for line in text[path] if not re.match(r"\s*(from|import) ", line)]
    assert sum(len(re.findall(r"\bAny\b", line)) for line in lines) < 30
    assert sum("type: ignore" in line for line in lines) < 10
    assert not any(re.search(r"\bcast\(", line) for line in lines)


def test_no_file_is_long() -> None:
    longest = max(FILES.values(), key=lambda path: len(path.read_text(encoding="utf-8").splitlines()))
    assert len(longest.read_text(encoding="utf-8").splitlines()) <= 400, longest
