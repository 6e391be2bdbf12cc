"""Reads every import of a checkout, and says which go upwards, in a circle, or into a script."""

import ast
import re

LOWEST = {"common"}
ROOMS = ["model", "loading", "loss", "measuring", "training", "planning"]  # of text_to_audio, downwards only
MAY_IMPORT = {
    "common": set(),
    "embedding_models": LOWEST,
    "store": LOWEST,
    "preparing": LOWEST | {"embedding_models", "store"},
    "text_to_audio": LOWEST | {"store"},
    **{
        f"text_to_audio.{room}": LOWEST | {"store", "text_to_audio"} | {f"text_to_audio.{each}" for each in ROOMS[:i]}
        for i, room in enumerate(ROOMS)
    },
    "music_library": LOWEST
    | {"embedding_models", "store", "text_to_audio"}
    | {f"text_to_audio.{room}" for room in ROOMS},
}
"""What each room may import besides itself; what is not named here (scripts, examples, tests) may import all."""
MAY_IMPORT["text_to_audio.measuring"] |= {"embedding_models.registry"}  # licences; it loads no encoder
MOST_MODULES = 15


def modules(root):
    """Dotted name -> path of every Python file of a checkout git would keep, `__init__` under its folder's name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part.startswith(".") or part in ("data", "demo", "demo-ablation") for part in parts[:-1]):
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, known):
    """The modules among `known` that a file imports, at any place in it; relative imports are not used here."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:  # a class or a function: the module that holds it
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found


def room_of(module):
    """The longest prefix of a module's name that has a rule, or None."""
    while module and module not in MAY_IMPORT:
        module = module.rpartition(".")[0]
    return module or None


def upward_imports(graph):
    """Lines "module imports module" for what a room may not import."""
    faults = []
    for module, imported in graph.items():
        room = room_of(module)
        for other in sorted(imported) if room else []:
            if room_of(other) != room and not {room_of(other), other} & MAY_IMPORT[room]:
                faults.append(f"{module} imports {other}")
    return faults


def cycle(graph):
    """The modules of one circle of imports, or an empty list."""
    done, way = set(), []

    def visit(module):
        if module in way:
            return way[way.index(module) :]
        if module not in done:
            way.append(module)
            for other in sorted(graph[module] - {module}):
                if found := visit(other):
                    return found
            way.pop()
            done.add(module)
        return []

    return next((found for module in graph if (found := visit(module))), [])


def import_graph(root):
    """Module -> the modules of the checkout that it imports. Importing `a.b` also runs a's `__init__`."""
    known = modules(root)
    return {name: imports(path, known) for name, path in known.items()}


def crowded_folders(root):
    """Lines "folder: number" for folders with too many modules; an `__init__` is none."""
    count = {}
    for path in modules(root).values():
        if path.name != "__init__.py":
            folder = path.parent.relative_to(root).as_posix()
            count[folder] = count.get(folder, 0) + 1
    return [f"{folder}: {number} modules" for folder, number in count.items() if number > MOST_MODULES]


def tree_of(readme):
    """The folders that README's tree names, one line each, those in text_to_audio by their full path."""
    block = re.search(r"## How it is laid out\n+```\n(.*?)```", readme, re.DOTALL)[1]
    folders, above = [], ""
    for line in block.splitlines():
        if match := re.match(r"(  )?([a-z_]+)/ ", line):
            above = above if match[1] else f"{match[2]}/"
            folders.append(f"{above}{match[2]}" if match[1] else match[2])
    return folders


def folders_with_python(root):
    """Folders of the product that hold modules: what README's tree has to name. Of helpers' folders the uppermost."""
    folders = {path.parent.relative_to(root).as_posix() for path in modules(root).values()} - {"."}
    return {folder if folder.startswith("text_to_audio/") else folder.split("/")[0] for folder in folders}
