# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The scripts stand alone, so what they share is there twice: the same to the letter."""

import itertools

import pytest

from conftest import ROOT
from fix_copies import copy_into, read_blocks

SCRIPTS = sorted(ROOT.glob("run_*.py"))
TOOLS = sorted([*(ROOT / "data_prep").glob("*.py"), *(ROOT / "tools").glob("*.py")])
OWN = {"parse_args", "check_args"}  # every tool's own, as main() is


@pytest.mark.parametrize("first, second", [*itertools.combinations(SCRIPTS, 2), *itertools.combinations(TOOLS, 2)])
def test_what_two_scripts_share_is_the_same_code(first, second):
    ours, theirs = read_blocks(first), read_blocks(second)
    different = {name for name in (set(ours) & set(theirs)) - OWN if ours[name] != theirs[name]}
    assert not different, f"`make fix-copies FROM=...` carries {sorted(different)} over"


def test_fix_copies_carries_the_good_version_over(tmp_path):
    good, old = tmp_path / "good.py", tmp_path / "old.py"
    good.write_text("A = 1\n\n\n# why\ndef f():\n    return A\n\n\ndef g():\n    pass\n")
    old.write_text('"""Doc."""\n\n\ndef f():\n    return 0\n\n\nA = 2\n\n\ndef main():\n    pass\n')
    assert sorted(copy_into(old, read_blocks(good))) == ["A", "f"]
    assert old.read_text() == '"""Doc."""\n\n\n# why\ndef f():\n    return A\n\n\nA = 1\n\n\ndef main():\n    pass\n'
