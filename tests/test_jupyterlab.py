"""A notebook in JupyterLab, as a person opens and runs it: a real server, a real browser.

The screenshot goes to a temporary folder, or to the one that ``CPLIB_SCREENSHOTS`` names.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from cplib.apps.notebooks import NOTEBOOKS, with_parameters

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")

NOTEBOOK = NOTEBOOKS / "01_augmentations.ipynb"
# No sandbox: the root of a container has none. No page is loaded but those of this machine.
OPTIONS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
# What a person would have: no question about news, and all cells drawn (else only those in sight).
SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}
OPENED = "() => window.jupyterapp?.shell.currentWidget?.context?.isReady"
RUN_ALL = """async () => {
    const tab = jupyterapp.shell.currentWidget;
    await tab.context.sessionContext.ready;
    await jupyterapp.commands.execute('notebook:run-all-cells');
    return tab.content.widgets.filter(cell => cell.model.type == 'code').map(cell => ({
        count: cell.model.executionCount,
        outputs: cell.model.outputs.toJSON().map(output => output.output_type)}));}"""
WIDTHS = "images => images.map(image => image.naturalWidth)"


@pytest.fixture
def lab(tmp_path, demo_root):
    """The address of a JupyterLab with one notebook; no settings of the user's are read."""
    notebook = with_parameters(NOTEBOOK, {"profile": "smoke", "data": str(demo_root)})
    nbformat.write(notebook, tmp_path / NOTEBOOK.name)
    home = tmp_path / "home"
    for name, text in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": tmp_path,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
        "LabApp.user_settings_dir": home / "settings",
        "LabApp.workspaces_dir": home / "workspaces",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]
    own = {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
    own["CPLIB_RESULTS"] = str(tmp_path / "results")
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        until_up(f"http://127.0.0.1:{port}/api/status", home / "log")
        yield f"http://127.0.0.1:{port}/lab"
    finally:
        server.terminate()
        server.wait(30)


def until_up(address: str, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(address).close()
        except OSError:
            assert time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.2)


def test_all_cells_of_a_notebook_run_and_its_figures_show(lab, tmp_path):
    album = Path(os.environ.get("CPLIB_SCREENSHOTS") or tmp_path)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = chromium.new_page(viewport={"width": 1400, "height": 12_000})  # all of the notebook
        page.goto(f"{lab}/tree/{NOTEBOOK.name}")
        page.wait_for_function(OPENED, timeout=60_000)
        cells = page.evaluate(RUN_ALL)
        assert page.locator(".jp-Dialog").count() == 0
        widths = page.locator(".jp-OutputArea img").evaluate_all(WIDTHS)
        page.screenshot(path=album / f"{NOTEBOOK.stem}.png")
        chromium.close()
    written = nbformat.read(NOTEBOOK, 4).cells
    assert len(cells) == 1 + sum(cell.cell_type == "code" for cell in written)  # the parameters
    assert all(cell["count"] for cell in cells)
    assert [cell for cell in cells if "error" in cell["outputs"]] == []
    assert widths
    assert all(width > 100 for width in widths)
