"""Formats the working tree and mends what the linters can mend."""

import subprocess
import sys

import lint

if __name__ == "__main__":
    codes = [subprocess.call(command, cwd=lint.ROOT) for command in lint.commands(fix=True).values()]
    sys.exit(max(codes))
