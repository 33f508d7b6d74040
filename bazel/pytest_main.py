"""Runs pytest on the files of a py_test the way Bazel asks for, with the repository's conftest.py.

Bazel's side: https://bazel.build/reference/test-encyclopedia
"""

import os
import pathlib
import sys

import pytest


class Shard:
    """Keeps each n-th collected test, for a py_test with shard_count."""

    def __init__(self, index: int, total: int):
        self.index = index
        self.total = total

    def pytest_collection_modifyitems(self, config, items):
        dropped = [item for i, item in enumerate(items) if i % self.total != self.index]
        items[:] = items[self.index :: self.total]
        config.hook.pytest_deselected(items=dropped)


def main(arguments):
    env = os.environ
    root = pathlib.Path(__file__).parents[1]
    options = [
        f"--rootdir={root}",
        f"--config-file={root / 'pyproject.toml'}",
        "-p",
        "no:cacheprovider",
        "-ra",
    ]
    plugins = []
    may_be_empty = False
    if "TEST_TMPDIR" in env:
        options.append("--basetemp=" + os.path.join(env["TEST_TMPDIR"], "pytest"))
    if "XML_OUTPUT_FILE" in env:
        options.append("--junitxml=" + env["XML_OUTPUT_FILE"])
    if env.get("TESTBRIDGE_TEST_ONLY"):  # --test_filter
        options += ["-k", env["TESTBRIDGE_TEST_ONLY"]]
        may_be_empty = True
    if env.get("TESTBRIDGE_TEST_RUNNER_FAIL_FAST") == "1":
        options.append("-x")
    if "TEST_TOTAL_SHARDS" in env:
        plugins.append(Shard(int(env["TEST_SHARD_INDEX"]), int(env["TEST_TOTAL_SHARDS"])))
        may_be_empty = True
        if env.get("TEST_SHARD_STATUS_FILE"):
            open(env["TEST_SHARD_STATUS_FILE"], "w").close()
    status = pytest.main(options + arguments, plugins=plugins)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and may_be_empty:
        return 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
