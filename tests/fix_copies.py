# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Carry the top-level names that scripts share from one of them into the others: `make fix-copies FROM=SCRIPT`.

The scripts stand alone, so what they share is there twice; a test holds that it is the same to the letter.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = {"main"}  # every script's table of contents


def find_names(source: str) -> dict[str, tuple[int, int]]:
    """First and last line (from 1, with decorators and the comment above) of every function, class and constant."""
    lines, names = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, first = node.targets[0].id, node.lineno
        else:
            continue
        while lines[first - 2].startswith("# ") and "----" not in lines[first - 2]:
            first -= 1
        names[name] = (first, node.end_lineno)
    return {name: span for name, span in names.items() if name not in OWN}


def read_blocks(path: Path) -> dict[str, str]:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    return {name: "\n".join(lines[a - 1 : b]) for name, (a, b) in find_names(source).items()}


def copy_into(path: Path, blocks: dict[str, str]) -> list[str]:
    """Replace every name of `path` that is in `blocks` and differs; returns the names replaced."""
    changed = []
    for name in [name for name, block in read_blocks(path).items() if blocks.get(name, block) != block]:
        source = path.read_text(encoding="utf-8")
        first, last = find_names(source)[name]
        lines = source.splitlines()
        path.write_text("\n".join([*lines[: first - 1], blocks[name], *lines[last:]]) + "\n", encoding="utf-8")
        changed.append(name)
    return changed


if __name__ == "__main__":
    origin = ROOT / sys.argv[1]
    for script in sorted(ROOT.glob("run_*.py")):
        if script != origin:
            print(f"{script.name}: {', '.join(copy_into(script, read_blocks(origin))) or 'nothing to do'}")
