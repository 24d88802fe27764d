"""The life of every folder that clipwright writes: check, claim, stage, publish, release.

One process at a time writes a folder: it holds the folder's lock (`core.lock`) from `claim` to the end. A folder may
be written if it is new, empty, or holds only what its own kind of command wrote; any other is refused and left
untouched. Which names belong to which kind is listed here and nowhere else. A file or folder is staged as
`.NAME.partial` beside its place, synced to disk and renamed: under its own name it is complete or absent.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import PARTIAL, fsync_path, is_staged, staged_path, write_json
from clipwright.pipeline.core.lock import LOCK, Lock, refuse_if_held, verify_held
from clipwright.pipeline.core.status import STATUS, status_verb
from clipwright.pipeline.folders.describe import describe
from clipwright.pipeline.folders.records import MANIFEST, ORIGIN, differences, read_manifest

CONFIG, IDENTITY, REPORT = "config.yaml", "identity.json", "report.json"
PLAN, REJECTS, DECISIONS, WORK = "plan.parquet", "rejects.parquet", "decisions.parquet", ".prep"
FOREIGN_SIDECAR = ".sidecar.parquet"  # not .parquet: img2dataset leaves a table of that name beside each tar
EMBED_WORK = ".embed"
PAGE, REPORT_PAGE = "view.html", "report.html"
CURRENT, VERSIONS = "current", "versions"
TOKENIZER = "tokenizer"
LOCK_NAME = re.compile(r"\.(.+\.)?lock(-.+)?")  # of a folder, of a part of it, of a folder beside it
NEW_FOLDER = "name a new folder or an empty folder with -o"
ONLY_TARS = "give a folder that holds tars and nothing that this command would write"
SHOWN = 6  # changed keys that an error lists


@dataclass(frozen=True)
class Kind:
    """One kind of output folder, and which names in it are its own.

    name: what messages call it.
    names, pattern: its own files and folders, by name and by regular expression; all kinds own staged ones, locks and
        status.json.
    early: those of `names` that an attempt may leave which ended before it recorded an identity; None for all of them.
    resumes: it records its identity when it is started, so that the same command continues it and another is refused.
    work: the folder in it for what only resuming needs, removed by `release`.
    format: of its manifest, once it is finished.
    guest_verb: the verb that writes it among files of others, which stay untouched.
    replaced: published as a complete folder, in place of an older one of the same format.
    config_key: a key that its `config.yaml` must have; another command's config is refused by it.
    """

    name: str
    names: tuple[str, ...] = ()
    pattern: str = ""
    early: tuple[str, ...] | None = None
    resumes: bool = False
    work: str = ""
    format: str = ""
    guest_verb: str = ""
    replaced: bool = False
    config_key: str = ""

    def owns(self, name: str) -> bool:
        """Whether a name in such a folder is this kind's."""
        return _is_common(name) or name in self.names or re.fullmatch(self.pattern, name) is not None

    def leaves(self, name: str) -> bool:
        """Whether an attempt may have left a name in a folder without a recorded identity."""
        if self.early is None:
            return self.owns(name)
        return _is_common(name) or name in self.early


DATASET = Kind(
    "dataset",
    names=(CONFIG, PLAN, REJECTS, DECISIONS, WORK, MANIFEST),
    pattern=r"[\w-]+-\d{6}\.(tar|parquet)",
    early=(CONFIG, PLAN, REJECTS, WORK),
    resumes=True,
    work=WORK,
    format="dataset",
)
FOREIGN = Kind(
    "index of a folder of tars",
    names=(REJECTS, DECISIONS, WORK, MANIFEST),
    pattern=rf".+{re.escape(FOREIGN_SIDECAR)}",
    early=(WORK,),
    resumes=True,
    work=WORK,
    format="dataset",
    guest_verb="data index",
)
INSPECTION = Kind("report", names=(REPORT, PAGE, REPORT_PAGE))
RUN = Kind("run", pattern=r".+", early=(CONFIG, TOKENIZER), resumes=True)
MODEL = Kind("model", early=(), format="model", replaced=True)
EMBEDDING = Kind(
    "embedding",
    names=(CONFIG, ORIGIN, EMBED_WORK, MANIFEST),
    pattern=r"part-\d+\.(npy|parquet)",
    early=(EMBED_WORK,),
    resumes=True,
    work=EMBED_WORK,
    format="embedding",
)
INDEX = Kind("index", names=(CONFIG, ORIGIN, CURRENT, VERSIONS))
EVALUATION = Kind("evaluation report", names=(CONFIG, REPORT, REPORT_PAGE))
DEMO = Kind("demo", pattern=r".+", config_key="steps")


@dataclass(frozen=True)
class Recorded:
    """What a folder records of the output in it: its identity, and its manifest once it is finished."""

    identity: dict[str, Any]
    manifest: dict[str, Any] | None = None


class Claim:
    """An output folder that this process alone may write, until `release` or the end of a `with` block."""

    def __init__(self, folder: Path, lock: Lock, *, made: bool) -> None:
        self.folder, self.lock, self._made = folder, lock, made

    def release(self) -> None:
        """Releases the lock; removes the folder of a report that was not written, if `claim` has made it."""
        self.lock.release()
        if self._made:
            with suppress(OSError):
                self.folder.rmdir()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def check(folder: Path, kind: Kind, also: Collection[str] = ()) -> Recorded | None:
    """Raises E_OUTPUT for a folder that `kind` may not write; returns what it records of an output of that kind.

    Writes nothing. also: further names that are the output's own.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise refused(folder, "it is a file")
    if kind.resumes and kind.format and (folder / MANIFEST).exists():
        description = describe(folder)
        if description.kind not in ("", kind.format):
            raise refused(folder, f"it is {description.text}", fix=ONLY_TARS if kind.guest_verb else NEW_FOLDER)
    found = recorded(folder, kind)
    if found is not None:
        if kind.guest_verb and found.identity.get("verb") != kind.guest_verb:
            raise refused(folder, f"it holds a {kind.format} of `clipwright prep`", fix=ONLY_TARS)
        return found
    names = sorted(path.name for path in folder.iterdir())
    if kind.replaced and MANIFEST in names:
        try:
            read_manifest(folder, kind.format)
        except ClipwrightError as error:
            raise refused(folder, f"it holds no {kind.name}: {error.found}") from None
        return None
    if kind.guest_verb:
        others = [name for name in names if _in_the_way(folder, kind, name)]
    else:
        others = [name for name in names if not kind.leaves(name) and name not in also]
    if others:
        fix = ONLY_TARS if kind.guest_verb else NEW_FOLDER
        raise refused(folder, f"it holds {', '.join(others[:3])}", fix=fix)
    if kind.config_key and (folder / CONFIG).exists() and kind.config_key not in read_yaml(folder / CONFIG):
        raise refused(folder, f"it holds a {CONFIG} of another command")
    return None


def claim(folder: Path, kind: Kind, also: Collection[str] = (), *, fresh: bool = False, part: str = "") -> Claim:
    """Makes the folder and claims it for this process; with `fresh`, clears it.

    part: a part of the work, such as `share-3-of-8`: other processes may claim other parts at the same time, of the
    same division. Raises E_OUTPUT as `check` or `clear` do, and E_LOCKED if another process writes the folder.
    """
    if not fresh:
        check(folder, kind, also)
    else:
        _clearable(folder, kind)
    made = kind is INSPECTION and not folder.exists()
    path = _lock_path(folder, kind, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    claimed = Claim(folder, Lock(path, folder), made=made)
    try:
        # Only now: of two processes that start at once, each sees the lock of the other.
        stale = refuse_if_held(_conflicting_locks(folder, part), folder)
        if not part:
            for path in stale:
                path.unlink(missing_ok=True)
        if not fresh:
            check(folder, kind, also)  # another process may have finished since
        elif not kind.replaced:
            clear(folder, kind)
    except BaseException:
        claimed.release()
        raise
    return claimed


def refuse_locked(folder: Path, kind: Kind) -> None:
    """Raises E_LOCKED if another process writes the folder: at the start of long work before `claim`."""
    refuse_if_held([_lock_path(folder, kind)], folder)


def _lock_path(folder: Path, kind: Kind, part: str = "") -> Path:
    if kind.replaced:  # the folder itself is replaced as a whole
        return folder.absolute().parent / f".{folder.absolute().name}{LOCK}"
    return folder / (f"{LOCK}-{part}" if part else LOCK)


def _conflicting_locks(folder: Path, part: str) -> list[Path]:
    """The locks that exclude the claim of a part: of the complete folder, and of another division of its shards.

    Without a part, the locks of all parts.
    """
    if not part:
        return list(folder.glob(f"{LOCK}-*"))
    others: list[Path] = []
    if part.startswith("share-"):
        division = part.rpartition("-of-")[2]
        others = [path for path in folder.glob(f"{LOCK}-share-*") if path.name.rpartition("-of-")[2] != division]
    return [folder / LOCK, *others]


def recorded(folder: Path, kind: Kind) -> Recorded | None:
    """What a folder records of an output of `kind`, or None. Raises E_MANIFEST, E_RESUME for what cannot be read."""
    if not kind.resumes:
        return None
    if kind.format and (folder / MANIFEST).exists():
        manifest = read_manifest(folder, kind.format)
        return Recorded(manifest.get("identity", {}), manifest)
    path = folder / kind.work / IDENTITY
    if not path.is_file():
        return None
    try:
        return Recorded(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ClipwrightError(
            "E_RESUME",
            f"the identity of an unfinished {kind.name} cannot be read",
            where=path,
            found=f"it is not JSON: {error}",
            fix="restore the file, or start over with --fresh",
        ) from None


def started(folder: Path, kind: Kind) -> bool:
    """Whether an output of `kind` has recorded its identity and is not finished, as far as the folder shows."""
    return (folder / kind.work / IDENTITY).is_file()


def record_identity(folder: Path, kind: Kind, identity: Mapping[str, Any]) -> None:
    """Records the identity of the output in a folder: from now on only a command of the same identity continues it."""
    (folder / kind.work).mkdir(parents=True, exist_ok=True)
    write_json(folder / kind.work / IDENTITY, identity)


def require_same(
    folder: Path,
    what: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    code: str = "E_OUTPUT",
    accept: Collection[str] = (),
    acceptable: re.Pattern[str] | None = None,
    remedies: Mapping[str, str] | None = None,
) -> None:
    """Raises `code` if a folder's identity differs from a config's, and lists the changed keys.

    what: the error's first clause. accept: keys that may differ. acceptable: keys that a user may accept. remedies:
    what else to do about a change of a key.
    """
    changed = {line.partition(": ")[0]: line for line in differences(old, new)}
    found = [line for key, line in changed.items() if key not in accept]
    if not found:
        return
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    choices = ["use the old values", "choose another folder", "start over with --fresh"]
    if acceptable is not None and all(acceptable.fullmatch(key) for key in changed):
        choices.insert(1, f"continue with the new ones by accept=[{','.join(changed)}]")
    choices[1:1] = [remedy for key, remedy in (remedies or {}).items() if key in changed]
    raise ClipwrightError(
        code,
        what,
        where=folder,
        found="; ".join(found[:SHOWN]) + more,
        fix=", ".join(choices[:-1]) + f", or {choices[-1]}",
    )


def clear(folder: Path, kind: Kind) -> None:
    """Removes what earlier commands of `kind` wrote and nothing else; the folder is claimed.

    Raises E_OUTPUT if it holds more than that. The manifest is removed first, so that no reader takes the rest for
    complete, and the identity last: what a kill leaves is still known as this kind's.
    """
    found, own = _clearable(folder, kind)
    if found is not None and found.manifest is not None:
        record_identity(folder, kind, found.identity)
    identity = kind.work or IDENTITY
    first = [name for name in own if name == MANIFEST]
    last = [identity] if found is not None or identity in own else []
    for name in [*first, *(name for name in own if name not in (MANIFEST, identity)), *last]:
        _remove(folder / name)


def _clearable(folder: Path, kind: Kind) -> tuple[Recorded | None, list[str]]:
    """Returns what a folder records, and the names in it that `clear` removes. Raises E_OUTPUT if there are others."""
    if folder.exists() and not folder.is_dir():
        raise refused(folder, "it is a file")
    try:
        found = recorded(folder, kind)
    except ClipwrightError:
        found = Recorded({}) if started(folder, kind) else None
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = [name for name in names if (kind.leaves(name) if kind.resumes and found is None else kind.owns(name))]
    if kind.guest_verb:
        own = [name for name in own if name != STATUS and not is_staged(name)]
    elif others := sorted(set(names) - set(own)):
        raise refused(folder, f"it holds {', '.join(others[:3])}", fix="remove it yourself, or name another folder")
    return found, [name for name in own if not LOCK_NAME.fullmatch(name)]


def release(folder: Path, kind: Kind) -> None:
    """Removes what only resuming needs: the output is finished, or nothing of it is worth keeping."""
    assert kind.work, kind.name
    shutil.rmtree(folder / kind.work, ignore_errors=True)


def refused(folder: Path, found: str, *, fix: str = NEW_FOLDER) -> ClipwrightError:
    """E_OUTPUT: a folder that may not be written."""
    return ClipwrightError("E_OUTPUT", "the output folder cannot be used", where=folder, found=found, fix=fix)


def remove_staged(folder: Path) -> None:
    """Removes the staged files and folders that a killed process left."""
    for path in folder.glob(f".*{PARTIAL}"):
        _remove(path)


def discard(path: Path) -> None:
    """Removes a folder; renames it first, so that a kill leaves no incomplete folder under its name."""
    staged = staged_path(path)
    path.rename(staged)
    shutil.rmtree(staged)


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A staged folder, empty at first, published as `final` when the block ends and removed if it raises."""
    old = _aside(final)
    if old.is_dir() and not final.exists():  # a kill between the two renames of an earlier publication
        old.rename(final)
    staged = staged_path(final)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        publish((staged, final))
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish(*renames: tuple[Path, Path], synced: bool = False) -> None:
    """Gives staged files or folders their final names, each in place of what has it: on disk first, then renamed.

    renames: pairs of staged and final path. synced: the staged contents are on disk already. Ends the process with
    E_LOCKED if another one has taken over a folder that it claimed.
    """
    if not synced:
        for staged, _ in renames:
            _sync(staged)
    verify_held()
    old = [_rename(staged, final) for staged, final in renames]
    for folder in {final.parent for _, final in renames}:
        fsync_path(folder)
    for path in old:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


def _rename(staged: Path, final: Path) -> Path | None:
    """Renames; returns where a folder that had the name was put aside."""
    if not final.is_dir():
        staged.replace(final)
        return None
    old = _aside(final)
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    try:
        staged.replace(final)
    except OSError:
        old.rename(final)
        raise
    return old


def _aside(final: Path) -> Path:
    """Where an old folder is put while a new one takes its name."""
    return final.with_name(f".{final.name}.old{PARTIAL}")


def _sync(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
    fsync_path(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_common(name: str) -> bool:
    """Whether a name is in use in folders of every kind."""
    return name == STATUS or is_staged(name) or LOCK_NAME.fullmatch(name) is not None


def _in_the_way(folder: Path, kind: Kind, name: str) -> bool:
    """Whether a foreign file in the folder has a name that `kind` would write."""
    if name == STATUS:
        return status_verb(folder) != kind.guest_verb
    return kind.owns(name) and not kind.leaves(name)
