"""Run the notebooks as Binder would, within its memory, and print what each took.

``python tests/binder_check.py [NOTEBOOK …]`` makes an environment with the versions that Binder has, prepares it by
``binder/postBuild``, runs each notebook (those of the repository, if none is named) from there, and ends with 1 where
one fails, takes too much memory, or the quickstart has to build a network. On Linux alone; minutes, and 3 GB of disk.

Memory that a process allocates is limited to what Binder gives to all. Beside it stands what all of them had resident
at once, shared pages counted once; the process that runs the notebook here stands for the server there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("NBFEAT_TEST_DATA", ROOT.parent / "shared" / "data"))
# What repo2docker 2026.4.0 puts into an image of Python 3.11, as far as notebooks notice it.
LOCKED = {
    "ipykernel": "7.0.1", "ipython": "9.6.0", "ipywidgets": "8.1.7", "jupyter_client": "8.6.3",
    "jupyter_server": "2.17.0", "jupyterlab": "4.4.9", "nbclient": "0.10.2", "notebook": "7.4.7", "traitlets": "5.14.3",
}  # fmt: skip
QUICKSTART = "01_quickstart"
GB = 2**30
LIMIT, QUICKSTART_LIMIT = 2 * GB, 1 * GB
SECONDS_A_CELL = 300
BETWEEN_LOOKS = 0.05  # seconds
ERROR = re.compile(r"^(?:\w+\.)*\w*Error\b.*", re.MULTILINE)
LAST = 3_000  # characters of what a notebook that fails says


@dataclass(frozen=True, slots=True)
class Ran:
    """What a notebook took, and why it is not good enough, if so."""

    name: str
    limit: int
    seconds: float
    together: int  # bytes that all processes had at once
    largest: int  # bytes that one process had at its peak
    built: int  # networks
    problem: str


def main() -> int:
    """Make the environment, run the notebooks, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("notebooks", nargs="*", type=Path, help="those of the repository, if none is named")
    parser.add_argument("--python", type=Path, help="of an environment that is there already, whatever its versions")
    parser.add_argument("--keep", type=Path, help="make the environment in this folder, and leave it there")
    asked = parser.parse_args()
    notebooks = asked.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    with tempfile.TemporaryDirectory(prefix="nbfeat-binder-") as folder:
        image = copied(Path(folder, "image"))
        venv = (asked.keep or Path(folder, "venv")).absolute()
        python = str(asked.python.absolute()) if asked.python else environment(venv, image)
        subprocess.run(["binder/postBuild"], cwd=image, env=variables(python, image), check=True)
        rows = []
        for path in notebooks:
            home = Path(folder, path.stem)  # whoever opens Binder has the image as it was made
            shutil.copytree(image, home, symlinks=True)
            rows.append(run(path, home, python))
            shutil.rmtree(home)
            print(f"… {path.name}: {rows[-1].problem or 'good'}", flush=True)
    print(f"\n{table(rows)}")
    return int(any(row.problem for row in rows))


def copied(image: Path) -> Path:
    """Copy the repository to where Binder has it, which is the home folder, and offer the weights that are here."""
    ignored = (line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())
    shutil.copytree(ROOT, image, symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))
    if (DATA / "keras_home").is_dir():  # Binder downloads them
        shutil.copytree(DATA / "keras_home", image / ".keras", copy_function=shutil.copyfile)
    return image


def environment(venv: Path, image: Path) -> str:
    """Make an environment as Binder does: what every image has, then what the repository asks for."""
    python = str(venv / "bin" / "python")
    version = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    subprocess.run([shutil.which(f"python{version}") or sys.executable, "-m", "venv", venv], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *(f"{name}=={number}" for name, number in LOCKED.items())], check=True)
    subprocess.run([*install, "-r", "binder/requirements.txt"], cwd=image, check=True)
    code = "import sys, importlib.metadata as m; print(*sys.version_info[:2], *map(m.version, sys.argv[1:]))"
    has = subprocess.run([python, "-c", code, *LOCKED], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    wanted = [*version.split("."), *LOCKED.values()]
    if has != wanted:
        print(f"Binder has Python and Jupyter in versions {' '.join(wanted)}; here they are {' '.join(has)}.")
    return python


def variables(python: str, home: Path) -> dict[str, str]:
    """Return the environment variables that a process on Binder would have."""
    foreign = re.compile(r"(NBFEAT|KERAS|XDG|JUPYTER|IPYTHON|PYTHON|VIRTUAL_ENV)")
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own reserves 1 GB and uses none, but the limit would count it
    }


def run(path: Path, home: Path, python: str) -> Ran:
    """Run a notebook within its limit of memory."""
    limit = QUICKSTART_LIMIT if path.stem == QUICKSTART else LIMIT
    notebook = home / "notebooks" / path.name
    shutil.copy(path, notebook)
    before, started = networks(home), time.perf_counter()
    execute = [python, "-m", "jupyter", "execute", "--kernel_name=python3", f"--timeout={SECONDS_A_CELL}"]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            ["prlimit", f"--data={limit}", *execute, notebook],
            env=variables(python, home), cwd=notebook.parent, stdout=said, stderr=said,
        )  # fmt: skip
        together, largest = watched(process)
        said.seek(0)
        text = said.read()
    seconds, built = time.perf_counter() - started, networks(home) - before
    problem = ""
    if process.returncode:
        print(f"\n{text[-LAST:]}")
        problem = f"failed: {([f'ended with {process.returncode}', *ERROR.findall(text)])[-1]}"
    elif max(together, largest) > limit:
        problem = f"took more than {limit / GB:.0f} GB"
    elif built and path.stem == QUICKSTART:
        problem = "had to build a network: have binder/postBuild prepare it"
    return Ran(path.stem, limit, seconds, together, largest, built, problem)


def networks(home: Path) -> int:
    """Count the networks that are kept in a home folder."""
    return len(list((home / ".cache" / "nbfeat" / "networks").glob("*/manifest.json")))


def watched(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process; return the most that it and all below it had at once, and the most that one of them had."""
    together = largest = 0
    while process.poll() is None:
        family = below(process.pid)
        together = max(together, sum(bytes_of(pid, "smaps_rollup", "Pss") for pid in family))
        largest = max(largest, *(bytes_of(pid, "status", "VmHWM") for pid in family), 0)
        time.sleep(BETWEEN_LOOKS)
    return together, largest


def below(pid: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(folder.name))
    family = [pid]
    for member in family:  # which grows meanwhile
        family += children.get(member, [])
    return family


def bytes_of(pid: int, file: str, entry: str) -> int:
    """Read an entry of one of the files that tell about a process; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{entry}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def table(rows: list[Ran]) -> str:
    """Return what was found as markdown."""
    lines = [
        "| notebook | seconds | limit | peak, all processes | peak, the largest | networks built | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        limit, *peaks = (f"{size / 2**20:,.0f} MB" for size in (row.limit, row.together, row.largest))
        words = (row.name, f"{row.seconds:.0f}", limit, *peaks, str(row.built), row.problem or "ok")
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
