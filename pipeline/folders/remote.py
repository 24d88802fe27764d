"""Files on object stores and web servers, fetched completely and checked, through obstore (extra `cloud`)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import staged_path
from clipwright.pipeline.core.messages import format_count

T = TypeVar("T")
SCHEMES = ("s3", "gs", "http", "https")
CONNECT_TIMEOUT = "10s"
REQUEST_TIMEOUT = "60s"  # of a request for at most RANGE_BYTES
RANGE_BYTES = 16 << 20
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 4.0)  # pauses before the retries
# Errors of obstore that a retry would meet again; the last is a server's that does not support byte ranges.
FINAL_ERRORS = ("NotFoundError", "PermissionDeniedError", "UnauthenticatedError", "NotSupportedError")


def is_remote(place: str) -> bool:
    """Whether a place is an address rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def fetch(address: str) -> bytes:
    """Fetches a small file. Raises E_EXTRA, E_REMOTE."""
    store, name = _open(address)
    return _with_retries(lambda: bytes(_obstore().get(store, name).bytes()), address)


def fetch_checked(address: str, sha256: str) -> bytes:
    """Fetches a small file of known SHA-256. Raises E_EXTRA, E_REMOTE, E_DATA_HASH."""
    for _ in range(2):
        data = fetch(address)
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise _mismatch(address)


def fetch_shard(address: str, path: Path, size: int, sha256: str) -> None:
    """Fetches a shard in ranges, so that a lost connection costs one range; its hash is checked before the rename.

    Raises E_EXTRA, E_REMOTE, E_DATA_HASH.
    """
    store, name = _open(address)
    staged = staged_path(path)
    try:
        for _ in range(2):
            hasher = hashlib.sha256()
            with staged.open("wb") as file:
                for start in range(0, size, RANGE_BYTES):
                    length = min(RANGE_BYTES, size - start)
                    data = _with_retries(lambda s=start, n=length: _fetch_range(store, name, s, n), address)
                    hasher.update(data)
                    file.write(data)
            if hasher.hexdigest() == sha256:
                staged.replace(path)
                return
    finally:
        with suppress(OSError):
            staged.unlink()
    raise _mismatch(address)


def check_address(address: str) -> None:
    """Raises E_EXTRA, E_REMOTE for an address that cannot be opened; does not connect."""
    _store(address)


def has_content(address: str, data: bytes) -> bool:
    """Whether a file exists and is equal to `data`."""
    store, name = _open(address)
    try:
        return bytes(_obstore().get(store, name).bytes()) == data
    except Exception:  # each store reports a missing file by another error; writing it will report a real problem
        return False


def upload(path: Path, address: str) -> None:
    """Writes a complete file or nothing. Raises E_EXTRA, E_REMOTE."""
    store, name = _open(address)
    _with_retries(lambda: _obstore().put(store, name, path), address)


def redacted(address: str) -> str:
    """Returns an address without what may be secret in it: user name, password, signature."""
    return re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?\S*", "", address))


def _obstore() -> Any:
    import obstore  # noqa: PLC0415  an extra that only remote shards need

    return obstore


@lru_cache(maxsize=64)
def _store(base: str) -> Any:
    if importlib.util.find_spec("obstore") is None:
        raise ClipwrightError(
            "E_EXTRA",
            "remote files need the extra `cloud`",
            where=redacted(base),
            found="the package obstore is not installed",
            fix="pip install 'clipwright[cloud]'",
        )
    scheme, _, rest = base.partition("://")
    if scheme.lower() not in SCHEMES or "@" in rest or "?" in base:
        raise ClipwrightError(
            "E_REMOTE",
            "the address is not supported",
            where=redacted(base),
            found=f"scheme {scheme.lower()}, or a password or a query in it",
            allowed=f"allowed: {', '.join(SCHEMES)}",
            fix="name bucket and prefix only; credentials come from the environment",
        )
    from obstore.store import from_url  # noqa: PLC0415

    endpoints = [value for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT_URL")]
    allow_http = scheme.lower() == "http" or any(value.startswith("http://") for value in endpoints)
    options: Any = {"allow_http": allow_http, "connect_timeout": CONNECT_TIMEOUT, "timeout": REQUEST_TIMEOUT}
    try:
        # Retries are made here: obstore does not retry a response that breaks off.
        return from_url(base, client_options=options, retry_config={"max_retries": 0})
    except Exception as error:  # each store has its own kind
        raise _unreachable(base, error) from None


def _open(address: str) -> tuple[Any, str]:
    base, _, name = address.rpartition("/")
    return _store(base), name


def _fetch_range(store: Any, name: str, start: int, length: int) -> bytes:
    data = bytes(_obstore().get_range(store, name, start=start, length=length))
    if len(data) != length:
        raise ConnectionError(f"{len(data)} of {format_count(length, 'byte')}")
    return data


def _with_retries(request: Callable[[], T], address: str) -> T:
    """Returns the result of `request`, retried after pauses unless the file is missing or access is denied."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return request()
        except Exception as error:  # obstore's own kinds
            final = type(error).__name__ in FINAL_ERRORS
            # In some stores of obstore, a missing file is a FileNotFoundError.
            if pause is None or final or isinstance(error, FileNotFoundError):
                raise _unreachable(address, error) from None
            time.sleep(pause)
    raise AssertionError


def _unreachable(address: str, error: Exception) -> ClipwrightError:
    lines = str(error).splitlines() or [type(error).__name__]
    return ClipwrightError(
        "E_REMOTE",
        "the remote file cannot be fetched or written",
        where=redacted(address),
        found=redacted(lines[0])[:300],
        fix="check the address, the network and the credentials in the environment, and run again",
    )


def _mismatch(address: str) -> ClipwrightError:
    return ClipwrightError(
        "E_DATA_HASH",
        "the remote file does not match its manifest",
        where=redacted(address),
        found="fetched twice, its size or SHA-256 differs",
        fix="upload the dataset folder again, the manifest last",
    )
