"""Runs the modules of the page outside of a page: in Node.js, or else in headless Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks import browser

SITE = Path(__file__).parent.parent / "export" / "site" / "web"
PARTS = Path(__file__).parent / "page_parts.mjs"
Script = Callable[..., Any]
"""The body of an async function, with `load(module)` and `data` (the keywords) -> what it returns, through JSON."""


@contextmanager
def scripts(folder: Path) -> Iterator[Script]:
    """What runs scripts; a skip where nothing does.

    Args:
        folder: empty, for a copy of the modules and of `page_parts.mjs`.
    """
    shutil.copytree(SITE, folder, dirs_exist_ok=True)
    shutil.copy(PARTS, folder)
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    (folder / "index.html").write_text("<!doctype html><title>modules</title>", encoding="utf-8")
    node = shutil.which("node")
    if node is not None:
        yield lambda body, **data: _in_node(node, folder, body, data)
    elif browser.installed() is not None:
        with browser.opened() as chromium, browser.served(folder) as address:
            page = chromium.page()
            page.open(address)
            page.wait("document.title === 'modules'")
            yield lambda body, **data: page.run(
                f"const load = (name) => import('/' + name); const data = {json.dumps(data)}; {body}"
            )
    else:
        pytest.skip("neither Node.js nor Chromium is installed")


def _in_node(node: str, folder: Path, body: str, data: dict[str, Any]) -> Any:
    script = f"""
        import {{ readFileSync }} from "node:fs";
        const data = JSON.parse(readFileSync(0));
        const load = (name) => import({json.dumps(folder.as_uri())} + "/" + name);
        const found = await (async () => {{{body}}})();
        process.stdout.write(JSON.stringify(found ?? null));
    """
    words = [node, "--input-type=module", "--eval", script]
    done = subprocess.run(words, input=json.dumps(data), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
