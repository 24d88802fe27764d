"""The machine and what is installed on it. No torch here."""

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

from clipwright.pipeline.doctor.base import Context, Found, check

CGROUP = Path("/sys/fs/cgroup")
SHARED, NVIDIA = Path("/dev/shm"), Path("/dev/nvidia0")
SHARED_GB = 1
OPEN_FILES = 1024
DISK_GB, MEMORY_GB = 1, 2  # below which even the demo is in danger


@check("python")
def python(context: Context) -> Found:
    need, found = metadata.metadata("clipwright")["Requires-Python"], platform.python_version()
    if SpecifierSet(need).contains(found, prereleases=True):
        return Found("ok", found, need)
    return Found("FAIL", found, need, f"make the environment again with a Python {need}")


@check("packages")
def packages(context: Context) -> Found:
    """Every package that ours requires, in an allowed version."""
    wanted = [Requirement(line) for line in metadata.requires("clipwright") or []]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong: list[tuple[Requirement, str]] = []
    for one in wanted:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append((one, "missing"))
            continue
        if not one.specifier.contains(version, prereleases=True):
            wrong.append((one, version))
    if not wrong:
        return Found("ok", f"{len(wanted)} packages", "versions that clipwright requires")
    fix = "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one, _ in wrong)
    found = ", ".join(f"{one.name} {version}" for one, version in wrong)
    return Found("FAIL", found, ", ".join(f"{one.name} {one.specifier}" for one, _ in wrong), fix)


@check("faiss")
def faiss(context: Context) -> Found:
    """Exactly one: faiss-cpu and faiss-gpu overwrite each other's files."""
    installed = {canonicalize_name(one.metadata["Name"]): one.version for one in metadata.distributions()}
    found = {name: version for name, version in sorted(installed.items()) if name.startswith("faiss-")}
    need, words = "exactly one", ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) == 1:
        return Found("ok", words, need)
    if found:
        again = f"pip uninstall -y {' '.join(found)} && pip install 'clipwright[cpu]'"
        return Found("FAIL", f"{words}: they overwrite each other's files", need, f"{again} (with a GPU: [gpu])")
    return Found("FAIL", "none", need, "pip install 'clipwright[cpu]' (with a GPU: [gpu])")


@check("cores")
def cores(context: Context) -> Found:
    """OpenMP threads against the cores that this process may use."""
    usable, threads = usable_cores(), os.environ.get("OMP_NUM_THREADS", "")
    found = f"{usable} usable of {os.cpu_count()}, OMP_NUM_THREADS {threads or 'not set'}"
    if threads.isdigit() and int(threads) > usable:
        return Found("warn", found, f"at most {usable} threads", f"export OMP_NUM_THREADS={usable}")
    return Found("ok", found)


@check("open files")
def open_files(context: Context) -> Found:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return Found("ok", "no limit" if limit == resource.RLIM_INFINITY else str(limit), f"at least {OPEN_FILES}")
    return Found("warn", str(limit), f"at least {OPEN_FILES}", f"ulimit -n {OPEN_FILES}")


@check("shared memory")
def shared_memory(context: Context) -> Found:
    """Where ranks of one machine exchange through NCCL, and containers give 64 MB by default."""
    try:
        size, _, free = shutil.disk_usage(SHARED)
    except OSError:
        return Found("ok", f"no {SHARED} here")
    found = f"{size / 2**30:.2g} GiB at {SHARED}, {free / 2**30:.2g} GiB of it free"
    if not NVIDIA.exists():
        return Found("ok", found, "none: without a GPU nothing needs it")
    need = f"{SHARED_GB} GiB free for NCCL"
    if free < SHARED_GB * 2**30:
        return Found("warn", found, need, "give the container more: docker run --shm-size=8g, or --ipc=host")
    return Found("ok", found, need)


@check("disk")
def disk(context: Context) -> Found:
    free = free_disk(context) / 1e9
    status = "ok" if free >= DISK_GB else "warn"
    fix = "" if status == "ok" else "free space, or work in another folder"
    return Found(status, f"{free:.1f} GB free at {disk_folder(context)}", f"{DISK_GB} GB", fix)


@check("memory")
def memory(context: Context) -> Found:
    free = free_memory() / 2**30
    status = "ok" if free >= MEMORY_GB else "warn"
    return Found(
        status, f"{free:.1f} GiB available", f"{MEMORY_GB} GiB", "" if status == "ok" else "end other programs"
    )


def usable_cores() -> int:
    """The cores this process may run on, by affinity and by its container's share."""
    allowed = len(os.sched_getaffinity(0))
    quota = _read("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        allowed = min(allowed, math.ceil(int(quota[0]) / int(quota[1])))
    return max(allowed, 1)


def free_memory() -> int:
    """Bytes that may still be taken, of the machine and of its container's share."""
    free = psutil.virtual_memory().available
    limit, used = _read("memory.max"), _read("memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return max(free, 0)


def disk_folder(context: Context) -> Path:
    """Where a run would be written: -o, or the folder it will be made in; without it the current one."""
    folder = (context.call.out or Path()).absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def free_disk(context: Context) -> int:
    return shutil.disk_usage(disk_folder(context)).free


def _read(name: str) -> str:
    """A file of the container's control group; empty where there is none."""
    try:
        return (CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
