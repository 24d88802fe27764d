"""Checks of the machine and its packages. This file imports no torch."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check

CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
NVIDIA_DEVICE = Path("/dev/nvidia0")
SHARED_MEMORY_GB = 1
OPEN_FILES = 1024
# Below these even the demo may fail.
DISK_GB = 1
MEMORY_GB = 2


@check("python")
def python(context: DoctorContext) -> CheckResult:
    need = metadata.metadata("clipwright")["Requires-Python"]
    found = platform.python_version()
    if SpecifierSet(need).contains(found, prereleases=True):
        return CheckResult("ok", found, need)
    return CheckResult("FAIL", found, need, f"create the environment again with Python {need}")


@check("packages")
def packages(context: DoctorContext) -> CheckResult:
    """Every required package is installed in an allowed version."""
    requirements = [Requirement(line) for line in metadata.requires("clipwright") or []]
    requirements = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong: list[tuple[Requirement, str]] = []
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append((requirement, "missing"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, version))
    if not wrong:
        return CheckResult("ok", f"{format_count(len(requirements), 'package')}", "versions that clipwright requires")
    return CheckResult(
        "FAIL",
        ", ".join(f"{item.name} {version}" for item, version in wrong),
        ", ".join(f"{item.name} {item.specifier}" for item, _ in wrong),
        "pip install " + " ".join(f"'{item.name}{item.specifier}'" for item, _ in wrong),
    )


@check("faiss")
def faiss(context: DoctorContext) -> CheckResult:
    """Exactly one faiss package: faiss-cpu and faiss-gpu overwrite each other's files."""
    installed = {canonicalize_name(item.metadata["Name"]): item.version for item in metadata.distributions()}
    faiss_packages = {name: version for name, version in sorted(installed.items()) if name.startswith("faiss-")}
    need = "exactly one"
    names = ", ".join(f"{name} {version}" for name, version in faiss_packages.items())
    install = "pip install 'clipwright[cpu]' (with a GPU: [gpu])"
    if len(faiss_packages) == 1:
        return CheckResult("ok", names, need)
    if faiss_packages:
        fix = f"pip uninstall -y {' '.join(faiss_packages)} && {install}"
        return CheckResult("FAIL", f"{names}: they overwrite each other's files", need, fix)
    return CheckResult("FAIL", "none", need, install)


@check("cores")
def cores(context: DoctorContext) -> CheckResult:
    """OpenMP threads against the cores that this process may use."""
    usable = usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    found = f"{usable} usable of {os.cpu_count()}, OMP_NUM_THREADS {threads or 'not set'}"
    if threads.isdigit() and int(threads) > usable:
        return CheckResult(
            "warn", found, f"at most {format_count(usable, 'thread')}", f"export OMP_NUM_THREADS={usable}"
        )
    return CheckResult("ok", found)


@check("open files")
def open_files(context: DoctorContext) -> CheckResult:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = f"at least {OPEN_FILES}"
    if limit == resource.RLIM_INFINITY:
        return CheckResult("ok", "no limit", need)
    if limit >= OPEN_FILES:
        return CheckResult("ok", str(limit), need)
    return CheckResult("warn", str(limit), need, f"ulimit -n {OPEN_FILES}")


@check("shared memory")
def shared_memory(context: DoctorContext) -> CheckResult:
    """NCCL connects the ranks of one machine through shared memory; containers have 64 MB of it by default."""
    try:
        size, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return CheckResult("ok", f"this machine has no {SHARED_MEMORY}")
    found = f"{size / 2**30:.2g} GiB at {SHARED_MEMORY}, {free / 2**30:.2g} GiB free"
    if not NVIDIA_DEVICE.exists():
        return CheckResult("ok", found, "none without a GPU")
    need = f"{SHARED_MEMORY_GB} GiB free for NCCL"
    if free < SHARED_MEMORY_GB * 2**30:
        return CheckResult("warn", found, need, "give the container more: docker run --shm-size=8g, or --ipc=host")
    return CheckResult("ok", found, need)


@check("disk")
def disk(context: DoctorContext) -> CheckResult:
    free = free_disk(context) / 1e9
    found = f"{free:.1f} GB free at {disk_folder(context)}"
    if free >= DISK_GB:
        return CheckResult("ok", found, f"{DISK_GB} GB")
    return CheckResult("warn", found, f"{DISK_GB} GB", "free space, or work in another folder")


@check("memory")
def memory(context: DoctorContext) -> CheckResult:
    free = free_memory() / 2**30
    found = f"{free:.1f} GiB available"
    if free >= MEMORY_GB:
        return CheckResult("ok", found, f"{MEMORY_GB} GiB")
    return CheckResult("warn", found, f"{MEMORY_GB} GiB", "end other programs")


def usable_cores() -> int:
    """Returns the number of cores this process may use, by CPU affinity and container quota."""
    allowed = len(os.sched_getaffinity(0))
    quota = _read_cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        allowed = min(allowed, math.ceil(int(quota[0]) / int(quota[1])))
    return max(allowed, 1)


def free_memory() -> int:
    """Returns the bytes available on this machine and within the container's limit."""
    free = psutil.virtual_memory().available
    limit, used = _read_cgroup("memory.max"), _read_cgroup("memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return max(free, 0)


def disk_folder(context: DoctorContext) -> Path:
    """Returns the existing folder in which a run would be written: -o or its parent; without -o the current one."""
    folder = (context.call.out or Path()).absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def free_disk(context: DoctorContext) -> int:
    return shutil.disk_usage(disk_folder(context)).free


def _read_cgroup(name: str) -> str:
    """Reads a file of the container's control group; empty if it does not exist."""
    try:
        return (CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
