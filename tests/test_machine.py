"""CPUs and memory of the machine, on files made up for the purpose, and what a run makes of them."""

import math
import os

import pytest
import torch

from engine import runtime as module
from engine.runtime import RuntimeConfig, prepare_runtime
from utils import machine
from utils.errors import InputError
from utils.machine import Cpus, find_cpus, free_memory


def write(root, files):
    """Write files by their paths."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def stat(*busy, total=100):
    """/proc/stat of a machine whose CPUs were busy that long."""
    rows = [f"cpu{n} {each // 2} 0 {each - each // 2} {total - each - 1} 1 0 0 0 7 7" for n, each in enumerate(busy)]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5 0 0"])


@pytest.fixture
def four_cpus(monkeypatch):
    """A process that may run on CPUs 0 to 3."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


@pytest.mark.parametrize(
    ("cpus", "free"),
    [
        (Cpus(4), 4),
        (Cpus(4, busy=0.3), 4),
        (Cpus(4, busy=0.7), 3),
        (Cpus(4, busy=2.1), 2),
        (Cpus(4, busy=4.0), 1),
        (Cpus(64, limit=2.5, busy=10.0), 2),
        (Cpus(4, limit=0.5, busy=0.0), 1),
    ],
)
def test_free_cpus(cpus, free):
    assert cpus.free == free


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, math.inf),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "100000 50000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/seen/from/the/host\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n2:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/m/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/m/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({}, math.inf),
    ],
)
def test_the_tightest_limit_of_the_control_groups(tmp_path, four_cpus, files, limit):
    write(tmp_path, files)
    assert find_cpus(tmp_path, 0) == Cpus(4, limit, 0.0)


def test_busy_cpus_are_counted_while_we_wait(tmp_path, four_cpus, monkeypatch):
    write(tmp_path, {"proc/stat": stat(10, 10, 10, 10, 10)})
    later = stat(30, 20, 10, 10, 30, total=120)  # one is fully busy, one half, and the last one is not ours
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: write(tmp_path, {"proc/stat": later}))
    assert find_cpus(tmp_path).busy == pytest.approx(1.5)


def test_without_affinity_all_cpus_are_allowed(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert find_cpus(tmp_path, 0) == Cpus(6, math.inf, 0.0)


MEMINFO = "MemTotal: 9000 kB\nMemFree:  10 kB\nMemAvailable:    8000 kB\n"
NEW, OLD = "sys/fs/cgroup/a", "sys/fs/cgroup/memory/x"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 8_192_000),
        ({"proc/meminfo": "MemTotal: 9000 kB\n"}, None),
        ({f"{NEW}/memory.max": "max\n", f"{NEW}/memory.current": "5\n"}, 8_192_000),
        ({f"{NEW}/memory.max": "7000\n", f"{NEW}/memory.current": "5000\n"}, 2000),
        (
            {
                f"{NEW}/memory.max": "7000\n",
                f"{NEW}/memory.current": "5000\n",
                f"{NEW}/memory.stat": "anon 1\ninactive_file 300\n",
            },
            2300,
        ),
        ({f"{NEW}/memory.max": "7000\n", f"{NEW}/memory.current": "8000\n"}, 0),
        (
            {
                "proc/self/cgroup": "3:memory:/x\n",
                f"{OLD}/memory.limit_in_bytes": "9000\n",
                f"{OLD}/memory.usage_in_bytes": "4000\n",
                f"{OLD}/memory.stat": "inactive_file 100\ntotal_inactive_file 500\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
            },
            5500,
        ),
    ],
)
def test_free_memory(tmp_path, files, free):
    group = {"proc/self/cgroup": "0::/a\n"} if free is not None else {}
    meminfo = {"proc/meminfo": MEMINFO} if free is not None else {}
    write(tmp_path, {**meminfo, **group, **files})
    assert free_memory(tmp_path) == free


# ---- as a run uses it


@pytest.mark.parametrize(
    ("vendor", "flags", "gains"),
    [
        ("GenuineIntel", "avx512f", False),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("AuthenticAMD", "avx512f", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("an ARM", "asimd bf16", True),
    ],
)
def test_which_cpus_gain_from_bfloat16(tmp_path, vendor, flags, gains):
    write(tmp_path, {"cpuinfo": f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse2\n"})
    assert module.gains_from_bfloat16(torch.device("cpu"), tmp_path / "cpuinfo") == gains


def test_a_machine_without_cpuinfo(tmp_path):
    assert not module.gains_from_bfloat16(torch.device("cpu"), tmp_path / "cpuinfo")


@pytest.fixture
def found(monkeypatch):
    """Say what the machine has; threads and flags are put back afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(module, "PYTORCH_THREADS", 8)
    monkeypatch.setattr(module, "gains_from_bfloat16", lambda device: True)
    monkeypatch.setattr(module, "allowed_cpus", lambda: set(range(4)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield lambda cpus: monkeypatch.setattr(module, "find_cpus", lambda: cpus)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("cpus", "flag", "threads", "line"),
    [
        (Cpus(4, busy=0.0), None, 4, "cpu, bf16, 4 threads on 4 CPUs"),
        (Cpus(4, busy=2.6), None, 1, "cpu, bf16, 1 thread on 4 CPUs (others use 2.6, --threads changes it)"),
        (Cpus(4, 1.5, 0.0), None, 1, "cpu, bf16, 1 thread on 4 CPUs (1.5 are granted, --threads changes it)"),
        (Cpus(16, busy=0.0), None, 8, "cpu, bf16, 8 threads on 16 CPUs (--threads changes it)"),
        (Cpus(4, 1.0, 4.0), 3, 3, "cpu, bf16, 3 threads on 4 CPUs"),
    ],
)
def test_threads_of_a_run(found, cpus, flag, threads, line):
    found(cpus)
    runtime = prepare_runtime(RuntimeConfig(threads=flag))
    assert torch.get_num_threads() == threads == runtime.threads
    assert str(runtime) == line
    assert runtime.facts() == {"device": "cpu", "precision": "torch.bfloat16", "threads": threads}


BEGUN = {"device": "cpu", "precision": "torch.float32", "threads": 3}


@pytest.mark.parametrize("config", [RuntimeConfig(), RuntimeConfig("cpu", "fp32", 3)])
def test_a_resumed_run_goes_on_with_what_it_began_with(found, config):
    found(Cpus(4, busy=3.0))
    runtime = prepare_runtime(config, BEGUN)
    assert runtime.facts() == BEGUN and torch.get_num_threads() == 3
    assert str(runtime) == "cpu, fp32, 3 threads on 4 CPUs"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RuntimeConfig(threads=2), "--threads is 2 but was 3 .* leave it out to go on with 3, or --overwrite"),
        (RuntimeConfig(precision="bf16"), "--precision is bf16 but was fp32"),
        (RuntimeConfig("cuda:1"), "--device is cuda:1 but was cpu"),
    ],
)
def test_a_resumed_run_refuses_what_it_did_not_begin_with(found, config, words):
    with pytest.raises(InputError, match=words):
        prepare_runtime(config, BEGUN)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_resumed_run_whose_device_is_gone(found, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="--device cuda:0: there are 0 CUDA devices; --overwrite starts again"):
        prepare_runtime(RuntimeConfig(name, threads=1), {"device": "cuda:0", "threads": 1})
