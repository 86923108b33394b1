"""A notebook server of its own and a headless Chromium: what a person sees of a notebook, and clicks in it.

Nothing of the user's is read or changed, and nothing outside this machine is asked: every folder is a temporary one,
and the browser resolves no name.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat

CHROMIUM = os.environ.get("NBFEAT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--hide-scrollbars",
    "--force-color-profile=srgb", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}  # fmt: skip
OFF = {"@jupyterlab/apputils-extension:announcements": True, "@jupyterlab/extensionmanager-extension": True}
FOLDERS = (
    "HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
)  # fmt: skip
PATHS = {
    "lab": "/lab/workspaces/{unique}/tree/{name}",
    "notebook": "/notebooks/{name}",
    "voila": "/voila/render/{name}",
}
MILLISECONDS = 60_000
IDLE = "() => window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'"


class Site:
    """A running server: the folder that its notebooks are in, and pages of it."""

    def __init__(self, kind: str, root: Path, address: str, token: str, browser: Any) -> None:
        self.kind, self.root, self.address, self.token, self.browser = kind, root, address, token, browser

    def write(self, name: str, *cells: str) -> str:
        """Write a notebook of these cells, and return its name."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.root / name)
        return name

    def open(self, name: str, *, width: int = 1280, height: int = 1000, dark: bool = False) -> Any:
        """Open a notebook in a browser window of its own, and wait for its kernel."""
        path = PATHS[self.kind].format(unique=secrets.token_hex(4), name=name)
        page = self.browser.new_context(viewport={"width": width, "height": height}).new_page()
        page.set_default_timeout(MILLISECONDS)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(f"{self.address}{path}?token={self.token}" + ("&theme=dark" if dark else ""))
        if self.kind != "voila":
            page.wait_for_selector(".jp-Notebook .jp-Cell")
            page.wait_for_function(IDLE)
        if self.kind == "lab":
            page.evaluate(
                "() => jupyterapp.shell.leftCollapsed || jupyterapp.commands.execute('application:toggle-left-area')"
            )
        if dark and self.kind != "voila":
            page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        return page


@contextmanager
def site(kind: str, folder: Path, browser: Any, **environment: str) -> Iterator[Site]:
    """Start Lab, Notebook or Voila, and stop it after the block."""
    root, config = folder / "root", folder / "JUPYTER_CONFIG_DIR" / "labconfig"
    root.mkdir(parents=True)
    config.mkdir(parents=True)
    (config / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    (config / "page_config.json").write_text(json.dumps({"disabledExtensions": OFF}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    own = {name: str(folder / name) for name in FOLDERS}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        _command(kind, port, token, root), env={**os.environ, **own, "PATH": path, **environment},
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(
            f"{address}/{'voila/static/' if kind == 'voila' else 'api/status'}?token={token}", server, folder / "log"
        )
        yield Site(kind, root, address, token, browser)
    finally:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(server.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                server.wait(3)
                break
        log.close()


def _command(kind: str, port: int, token: str, root: Path) -> list[str]:
    shared = ["--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    if kind == "voila":
        return [sys.executable, "-m", "voila", *shared, f"--token={token}", f"--Voila.root_dir={root}"]
    app = {"lab": "LabApp", "notebook": "JupyterNotebookApp"}[kind]
    module = {"lab": "jupyterlab", "notebook": "notebook"}[kind]
    return [
        sys.executable, "-m", module, *shared, "--allow-root", "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}", "--LabApp.news_url=None",
        "--LabApp.extension_manager=readonly", f"--{app}.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=2):  # our own
                return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


# What a person does in Lab and Notebook


def run_all(page: Any) -> None:
    """Run all cells, and wait for the last."""
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
    wait_for_cells(page)


def run_cell(page: Any, number: int, *, wait: bool = True) -> None:
    """Run one cell."""
    page.evaluate(f"() => {{ jupyterapp.shell.currentWidget.content.activeCellIndex = {number} }}")
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-cell') }")
    if wait:
        wait_for_cells(page)


def wait_for_cells(page: Any) -> None:
    """Wait until no cell runs, or waits to."""
    prompts = "[...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')]"
    page.wait_for_function(f"() => {prompts}.every(prompt => !prompt.textContent.includes('*'))")


def output(page: Any, number: int) -> str:
    """Return the text that a cell put out."""
    outputs = page.locator(".jp-Notebook .jp-Cell").nth(number).locator(".jp-OutputArea-output")
    return "\n".join(outputs.all_inner_texts()).strip()


def done_of(page: Any) -> int:
    """Return how many images a panel says are done."""
    match = re.search(r"([\d,]+) of [\d,]+ images", page.locator(".nbfeat-progress").first.inner_text())
    return int(match[1].replace(",", "")) if match else 0
