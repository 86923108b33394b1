"""How many cores a run uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbfeat.extraction.columns import free_bytes
from nbfeat.inference.engines import cpu_count
from nbfeat.inference.engines.cpu_count import available_cores, quotas


def groups(folder: Path, text: str) -> Path:
    file = folder / "groups"
    file.write_text(text)
    return file


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_container_has_its_quota(tmp_path: Path) -> None:
    write(tmp_path / "root/cpu.max", "150000 100000\n")
    assert list(quotas(tmp_path / "root", groups(tmp_path, "0::/\n"))) == [1.5]
    write(tmp_path / "root/cpu.max", "max 100000\n")
    assert list(quotas(tmp_path / "root", groups(tmp_path, "0::/\n"))) == []


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    host = free_bytes(tmp_path / "root", groups(tmp_path, "0::/\n"))
    assert host is not None
    for kind, limit, used, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for name, text in ((limit, "3000\n"), (used, "2500\n"), ("memory.stat", f"{cached} 700\nanon 5\n")):
            write(tmp_path / f"root/{kind}{name}", text)
        assert free_bytes(tmp_path / "root", groups(tmp_path, "5:memory:/\n0::/\n")) == 1200
        write(tmp_path / f"root/{kind}{limit}", "max\n")
        assert (free_bytes(tmp_path / "root", groups(tmp_path, "5:memory:/\n0::/\n")) or 0) >= host / 2


def test_groups_around_this_one_count_too(tmp_path: Path) -> None:
    write(tmp_path / "root/user.slice/cpu.max", "400000 100000\n")
    write(tmp_path / "root/user.slice/job.scope/cpu.max", "max 100000\n")
    write(tmp_path / "root/other.slice/cpu.max", "10000 100000\n")
    assert list(quotas(tmp_path / "root", groups(tmp_path, "0::/user.slice/job.scope\n"))) == [4.0]


def test_so_do_groups_of_the_first_version(tmp_path: Path) -> None:
    told = groups(tmp_path, "5:memory:/a\n4:cpu,cpuacct:/a/b\n1:name=systemd:/c\n")
    for place, quota in (("a/b", "-1"), ("a", "250000"), ("", "300000")):
        write(tmp_path / "root/cpu" / place / "cpu.cfs_quota_us", quota)
        write(tmp_path / "root/cpu" / place / "cpu.cfs_period_us", "100000")
    assert list(quotas(tmp_path / "root", told)) == [2.5, 3.0]


def test_where_there_are_no_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert list(quotas(tmp_path / "root", tmp_path / "nowhere")) == []
    write(tmp_path / "root/cpu.max", "nonsense")
    assert list(quotas(tmp_path / "root", groups(tmp_path, "0::/../outside\n"))) == []


def test_a_part_of_a_core_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_count, "quotas", lambda: iter([0.25]))
    assert available_cores() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be chosen on Linux alone")
def test_a_process_bound_to_one_core_has_one() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from nbfeat.inference.engines.cpu_count import available_cores; print(available_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "1\n"


def test_where_a_system_has_no_proc_half_of_its_memory_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unknown)
    assert free_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    monkeypatch.delattr(os, "sysconf")  # Windows has none
    assert free_bytes() is None
