"""What tests share: homes of their own, test data where it is there, photographs drawn here."""

from __future__ import annotations

import importlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from traitlets.config import Config

import nbfeat
from nbfeat.inference import prepared
from tests.faces import FACES, Face
from tests.fake import FakeEngine, FakeNetwork, Gate

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(nbfeat.__file__).resolve().parent != ROOT / "nbfeat"  # and not the checkout's
DATA = Path(os.environ.get("NBFEAT_TEST_DATA", ROOT.parent / "shared" / "data"))
# Files of long tests that share no fixture of their own: with xdist each test goes to whichever process is idle.
APART = {"test_architectures.py", "test_notebooks.py", "test_promises.py"}
# Other tests of hostile input, which belong to the sweep of `tests/robustness` too.
HOSTILE = {
    "test_hdf5.py", "test_interrupts.py", "test_public_hosts.py", "test_remote.py", "test_torch_weights.py",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `HOSTILE`, but for those that take ten seconds and more."""
    for item in items:
        if item.path.name in HOSTILE and "largest" not in item.name:
            item.add_marker(pytest.mark.robustness)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Add up hostile trials; a test that doesn't count any is one."""
    total: Counter[str] = Counter()
    passed = {report.nodeid for report in terminalreporter.stats.get("passed", [])}
    for report in terminalreporter.stats.get("", []):
        if report.when == "teardown" and report.nodeid in passed and "robustness" in report.keywords:
            total.update(dict(report.user_properties).get("trials") or {Path(report.fspath).stem: 1})
    if total:
        kinds = " · ".join(f"{kind} {count:,}" for kind, count in sorted(total.items()))
        terminalreporter.write_line(f"{sum(total.values()):,} hostile trials: {kinds}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file together, for its fixtures; those of `APART`, and hostile ones, go one by one."""
    xdist: Any = importlib.import_module("xdist.scheduler")

    class ByFile(xdist.LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).name in APART or "robustness" in file else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def modules_of_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have child processes import these tests, and the same package as they do, wherever they run."""
    folder = ROOT
    if INSTALLED:
        folder = tmp_path_factory.mktemp("modules")  # where the tests lie without the package beside them
        (folder / "tests").mkdir()
        (folder / "tests" / "__init__.py").write_text(f"__path__ = [{str(ROOT / 'tests')!r}]\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # some take the path over from their parent
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("PYTHONSAFEPATH", "1")  # otherwise the folder in which they run comes first
        yield


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep networks in a folder of this session, so that each is built once and nobody's own is touched."""
    home = tmp_path_factory.mktemp("nbfeat-home")
    home.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBFEAT_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def own_cache(own_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give each test a home without features in it; networks are shared."""
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o700)
    (own_home / "networks").mkdir(mode=0o700, exist_ok=True)
    (home / "networks").symlink_to(own_home / "networks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBFEAT_HOME", str(home))
        yield home


@pytest.fixture(scope="session", autouse=True)
def keras_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give Keras a home of this session: a copy of the test data's where there is one, else an empty one."""
    home = tmp_path_factory.mktemp("keras-home")
    if (DATA / "keras_home").is_dir():
        shutil.copytree(DATA / "keras_home", home, dirs_exist_ok=True, copy_function=shutil.copyfile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of test data, or skip where it is not on this machine."""
    if not (DATA / "README.md").is_file():
        pytest.skip(f"no test data at {DATA}: set NBFEAT_TEST_DATA to a folder that has them")
    return DATA


@pytest.fixture(scope="session")
def flowers(shared_data: Path) -> pd.DataFrame:
    """Return a frame of the 300 flower photographs: path and label."""
    files = sorted((shared_data / "photos" / "flowers5").glob("*/*.jpg"))
    return pd.DataFrame({"path": [str(file) for file in files], "label": [file.parent.name for file in files]})


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw twenty small pictures of four kinds, each of its own hue and direction."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(20):
        kind = number % 4
        wave = np.sin(np.linspace(0, 6 + 4 * kind, 48))
        ground = wave[None, :] if kind % 2 else wave[:, None]
        color = np.eye(3)[kind % 3] * 90
        pixels = 128 + ground[..., None] * color + generator.normal(0, 8, (48, 48, 3))
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Draw 8,000 tiny images, no two alike, and return their paths."""
    folder, generator = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    paths = [str(folder / f"{number:05d}.png") for number in range(8_000)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def photos(pictures: Path) -> pd.DataFrame:
    """Return a small frame: path, label and split, with an index that is not a range."""
    paths = sorted(map(str, pictures.glob("*.png")))
    frame = pd.DataFrame({"path": paths, "label": [f"kind {number % 4}" for number in range(20)]})
    frame["split"] = np.where(np.arange(20) < 14, "train", "test")
    frame.index = pd.Index([f"row {number}" for number in range(20)], name="name")
    return frame


@pytest.fixture
def fake_network(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """Put a pretended network in place of every real one."""
    FakeEngine.opened = FakeEngine.computed = 0
    monkeypatch.setattr(prepared, "PreparedNetwork", FakeNetwork)
    return FakeEngine


@pytest.fixture
def gate(fake_network: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> Gate:  # what it is for
    """Return a gate in the pretended network."""
    return Gate(monkeypatch)


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    """Return an IPython shell of its own, with the extension loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        patch.delenv("VIRTUAL_ENV", raising=False)  # IPython warns where another environment is active
        config = Config()
        config.HistoryManager.enabled = False
        config.InteractiveShell.cache_size = 0  # a reset would search all of memory for garbage
        config.IPCompleter.use_jedi = False  # which takes seconds, over cells that are none of its business
        shell = InteractiveShell.instance(config=config)
        shell.run_line_magic("load_ext", "nbfeat")
        yield shell
        InteractiveShell.clear_instance()


@pytest.fixture
def extract(request: pytest.FixtureRequest, shell: InteractiveShell) -> Face:
    """Return Python's face of extraction, or each of the four in turn in tests marked with `every_face`."""
    shell.reset(new_session=False)
    face: Face = FACES[getattr(request, "param", "python")](shell)
    return face
