"""The notebooks in JupyterLab, as a person opens and runs them: a real server, a real browser.

Screenshots go to a temporary folder, or to the one that ``CPLIB_SCREENSHOTS`` names.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import papermill
import pytest

from cplib.apps.notebooks import NOTEBOOKS

from browser import browser, needs_chromium, stop

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
pytestmark = needs_chromium

NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))]
RUN = [name for name in NAMES if name[:2] in ("01", "03", "12")]

# What a person would have: no question about news, and all cells drawn (else only those in sight).
SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}
CELLS = """tab.content.widgets.map(cell => ({
    kind: cell.model.type, count: cell.model.executionCount,
    outputs: (cell.model.outputs?.toJSON() ?? []).map(output => output.output_type)}))"""
IMAGES = """[...tab.node.querySelectorAll('.jp-OutputArea img')].map(image => image.naturalWidth)"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory, demo_root) -> Path:
    """A folder with three notebooks, their parameters set as ``run_all.sh`` sets them."""
    desk = tmp_path_factory.mktemp("desk")
    for name in RUN:
        source, chosen = NOTEBOOKS / f"{name}.ipynb", {"profile": "smoke", "data": str(demo_root)}
        papermill.execute_notebook(source, desk / source.name, chosen, prepare_only=True)
    return desk


@pytest.fixture(scope="module")
def lab(desk, tmp_path_factory):
    """A page with JupyterLab open on the desk; no settings of the user's are read."""
    home = tmp_path_factory.mktemp("home")
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
        "ServerApp.root_dir": desk,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
        "LabApp.user_settings_dir": home / "settings",
        "LabApp.workspaces_dir": home / "workspaces",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]
    own = {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
    own["CPLIB_RESULTS"] = str(desk / "results")
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        until_up(f"{address}/api/status", home / "log")
        with browser(home / "chromium") as page:
            page.resize(1400, 1000)
            page.open(f"{address}/lab")
            page.wait("window.jupyterapp && jupyterapp.restored.then(() => true)", 60)
            yield page
    finally:
        stop(server)


def until_up(address: str, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(address).close()
        except OSError:
            assert time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.2)


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Where the screenshots are kept."""
    return Path(os.environ.get("CPLIB_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


def open_notebook(lab, name: str) -> None:
    """Open one in a tab, its kernel started; the page's ``tab`` is it."""
    lab.js(f"""(async () => {{
        window.tab = await jupyterapp.commands.execute(
            'docmanager:open', {{path: '{name}.ipynb', kernel: {{name: 'python3'}}}});
        await tab.context.ready;
        await tab.context.sessionContext.ready;}})()""")
    lab.wait("jupyterapp.shell.currentWidget === tab")


def close_notebook(lab) -> None:
    """Save and close the tab, and end its kernel."""
    lab.js("""(async () => {
        await tab.context.save();
        await tab.context.sessionContext.shutdown();
        tab.close();})()""")
    lab.wait("tab.isDisposed")


def run_all(lab, album: Path, name: str) -> list[dict]:
    """Run all cells; what is said of each of those that are code."""
    open_notebook(lab, name)
    lab.js("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 0)")
    keep(lab, album / f"{name}.png")
    return [cell for cell in lab.js(CELLS) if cell["kind"] == "code"]


def keep(lab, path: Path) -> None:
    """A screenshot of a whole notebook: the window is made as high as it is."""
    height = lab.js("tab.content.node.querySelector('.jp-WindowedPanel-inner').scrollHeight")
    lab.resize(1400, min(int(height) + 200, 12_000))
    time.sleep(0.5)  # JupyterLab lays out anew
    lab.js("tab.node.querySelector('.jp-WindowedPanel-outer').scrollTo(0, 0)")
    lab.screenshot(path, whole=False)
    lab.resize(1400, 1000)


@pytest.mark.parametrize("name", RUN)
def test_all_cells_of_a_notebook_run_and_its_figures_show(lab, desk, album, name):
    cells = run_all(lab, album, name)
    assert len(cells) == sum(
        c.cell_type == "code" for c in nbformat.read(desk / f"{name}.ipynb", 4).cells
    )
    assert lab.js("document.querySelectorAll('.jp-Dialog').length") == 0
    assert all(cell["count"] for cell in cells)
    assert [cell for cell in cells if "error" in cell["outputs"]] == []
    assert lab.js(IMAGES)
    assert all(width > 100 for width in lab.js(IMAGES))
    close_notebook(lab)
