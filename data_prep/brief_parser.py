# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How these tools take flags: argparse, that answers a wrong command line in a few lines, with the nearest flag."""

import argparse
import difflib
import sys

MOST_LINES = 5


class BriefParser(argparse.ArgumentParser):
    """An ArgumentParser that names every flag that is none, before what is missing, and prints no usage."""

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else [str(word) for word in args]
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        flags = dict.fromkeys(word.split("=")[0] for word in words if word.startswith("--") and " " not in word)
        unknown = [flag for flag in flags if flag != "--" and not any(name.startswith(flag) for name in known)]
        if unknown:
            near = [difflib.get_close_matches(flag, known, 1, 0.7) for flag in unknown]
            hints = [f"did you mean {found[0]}?" if found else "--help lists all" for found in near]
            lines = [f"{flag}: no such flag; {hint}" for flag, hint in zip(unknown, hints, strict=True)]
            self.error("\n  ".join(lines[:MOST_LINES]))
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")
