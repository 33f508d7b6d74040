"""The settings of every test, under Bazel and under plain pytest alike.

Promotion of dtypes or of ranks that nobody asked for is an error. Environment
variables rather than jax.config: tests that do not need JAX do not import it,
and the processes that a test starts are as strict.
"""

import asyncio
import inspect
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "TEST_TMPDIR" in os.environ:  # a sandbox, from which the user's cache cannot be written
    os.environ.setdefault("PIPPIN_CACHE_DIR", os.path.join(os.environ["TEST_TMPDIR"], "cache"))


def pytest_pyfunc_call(pyfuncitem):
    """Runs a test that is a coroutine function, in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
