"""Who imports whom, read from the source text: rooms, their floors, circles.

    python docs/imports.py

writes docs/house.md anew. A room is a package of ultradino_jax, a root module, the
package's own `__init__` (its public names) or one of the two scripts; none is grouped
with another. Imports inside functions count like all others. tests/test_imports.py
asks the same functions.
"""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "ultradino_jax"

Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    """The dotted name of a file; of a package that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> dict[str, Path]:
    """{module: path} of the package and the two scripts."""
    paths = [*(ROOT / PACKAGE).rglob("*.py"), ROOT / "main.py", ROOT / "eval.py"]
    return {module_name(path): path for path in sorted(paths)}


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, anywhere in it.

    `from a import b` gives a and a.b; relative imports are resolved.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def file_graph() -> Graph:
    """{module: modules of the project that it imports}.

    A package itself counts only where one of its own names is imported: to import
    a.b.c is not to use a.
    """
    known = files()
    graph = {}
    for name, path in known.items():
        found = {other for other in imported(path) & set(known) if other != name}
        packages = {p for p in found if known[p].stem == "__init__"}
        used = {
            p
            for p in packages
            if any(
                i.startswith(f"{p}.") and i.count(".") == p.count(".") + 1
                for i in imported(path) - set(known)
            )
        }
        graph[name] = (found - packages) | used
    return graph


def room(module: str) -> str:
    """The room a module is in: the part of its name below the package's."""
    return module.removeprefix(f"{PACKAGE}.").split(".")[0]


def purpose(name: str) -> str:
    """What is in a room: the first line of its docstring."""
    known = files()
    path = known.get(f"{PACKAGE}.{name}") or known[name]
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def room_graph(graph: Graph) -> Graph:
    """{room: rooms it imports}."""
    rooms: Graph = {room(name): set() for name in graph}
    for name, others in graph.items():
        rooms[room(name)] |= {room(other) for other in others} - {room(name)}
    return rooms


def circle(graph: Graph) -> list[str]:
    """Names along one circle, [] where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def floors(graph: Graph) -> dict[str, int]:
    """{name: 1 for what imports nothing, else one above the highest it imports}.

    Raises graphlib.CycleError when there is a circle.
    """
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[other] for other in graph[name]), default=0)
    return found


def page() -> str:
    """docs/house.md."""
    rooms = room_graph(file_graph())
    levels = floors(rooms)
    order = sorted(rooms, key=lambda name: (-levels[name], name))
    lines = [
        "# The house",
        "",
        "Packages and root modules by floor: each imports only from floors below its",
        "own. Drawn from the code by `python docs/imports.py`; a test holds it to the",
        "code.",
        "",
        "| Floor | Room | What is in it | Imports |",
        "|---|---|---|---|",
    ]
    for name in order:
        below = sorted(rooms[name], key=order.index)
        cells = (levels[name], name, purpose(name), ", ".join(below) or "-")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "```mermaid", "graph TD"]
    for name in order:
        for other in sorted(rooms[name], key=order.index):
            # An arrow that a longer way already says is left out.
            others = rooms[name] - {other}
            if not any(other in reachable(rooms, between) for between in others):
                lines.append(f"    {name} --> {other}")
    return "\n".join([*lines, "```", ""])


def reachable(graph: Graph, start: str) -> set[str]:
    """All that `start` imports, through others too."""
    found, waiting = set(), [start]
    while waiting:
        for other in graph[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


if __name__ == "__main__":
    (ROOT / "docs" / "house.md").write_text(page())
