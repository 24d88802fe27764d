"""Coded errors: one line that states what failed, where, what was found and allowed, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from clipwright.pipeline.core.text import shorten

_MAX_SEGMENT = 2000  # characters: whatever value a message echoes, it stays readable

# Every code that clipwright can end with: its exit code (2 config or command line, 3 input refused, 1 failed) and its
# meaning. Codes of rows (E_IMG_*, E_TAR_*, E_PAIR_*, E_CAP_*) are also the reasons in rejects.parquet.
CODES: dict[str, tuple[int, str]] = {
    "E_USAGE": (2, "the command line is malformed"),
    "E_CONFIG_FILE": (2, "a config file is missing, not YAML, or for another command"),
    "E_CONFIG_KEY": (2, "a config key does not exist"),
    "E_CONFIG_CHOICE": (2, "a name is not in its registry"),
    "E_CONFIG_VALUE": (2, "a config value has the wrong type or is out of range"),
    "E_PLUGIN": (2, "a plugin file cannot be imported"),
    "E_BATCH": (2, "the global batch cannot be split evenly over the ranks"),
    "E_WORLD": (2, "the launcher's environment variables contradict each other or are incomplete"),
    "E_HOSTFILE": (3, "a hostfile is missing or malformed"),
    "E_LAUNCH": (1, "the ranks could not be started, or ended without an error message"),
    "E_EXTRA": (2, "a package of an optional extra is not installed"),
    "E_CACHE": (2, "the shard cache is too small for the shards in use"),
    "E_OUTPUT": (2, "the output folder holds something else"),
    "E_LOCKED": (1, "another process is writing the folder"),
    "E_RESUME": (2, "the unfinished output was made with another config"),
    "E_SYSTEM": (1, "the operating system refused: disk full, no permission, a file where a folder should be"),
    "E_INPUT": (3, "an input file or folder is missing or unreadable"),
    "E_TABLE": (3, "a table cannot be read"),
    "E_COLUMN": (3, "a table does not have the column"),
    "E_MANIFEST": (3, "a folder has no manifest, or one of another format or version"),
    "E_DATA_HASH": (3, "a shard or sample does not match its manifest"),
    "E_DATA_SMALL": (3, "a dataset has fewer samples than needed"),
    "E_BAD_SAMPLES": (3, "too many samples of a dataset cannot be read"),
    "E_REMOTE": (3, "a remote file cannot be fetched or written"),
    "E_CLASSES": (3, "classes and labels do not match each other"),
    "E_MODEL_HASH": (3, "a model file does not match its manifest"),
    "E_MODEL_SHAPE": (3, "the weights do not fit the model's config, or are not finite"),
    "E_IMPORT": (3, "a foreign model folder is incomplete, contradicts itself or is not supported"),
    "E_PARITY": (1, "an imported model does not reproduce the outputs of its source"),
    "E_MODEL_DIM": (3, "the embedding dimension of the model differs from the index's"),
    "E_UNSAFE": (3, "a file could run code where only data is allowed"),
    "E_FINGERPRINT": (3, "the inputs were made with different models"),
    "E_UNFINISHED": (3, "a step or part of the job is missing or did not finish"),
    "E_EMBED_HASH": (3, "an embedding file does not match its manifest"),
    "E_INDEX_HASH": (3, "an index file does not match its manifest"),
    "E_INDEX_ROWS": (3, "embeddings and rows do not belong together"),
    "E_CKPT_NONE": (3, "the requested checkpoint does not exist"),
    "E_CKPT_HASH": (3, "a checkpoint file does not match its manifest"),
    "E_CKPT_STATE": (3, "a checkpoint has values that no training step makes"),
    "E_DISK": (1, "the disk has no room for a checkpoint"),
    "E_DOCTOR": (1, "a check of doctor failed"),
    "E_NONFINITE": (1, "a loss, gradient or embedding is not finite"),
    "E_TECHNIQUE": (1, "a technique of the training config failed"),
    "E_WORKER": (1, "a worker process died"),
    "E_RANK": (1, "a rank died, is stopped or cannot be reached"),
    "E_HANG": (1, "a rank made no progress within the timeout"),
    "E_UNSAVED": (1, "the run was asked to stop and could not save in time"),
    "E_INTERNAL": (1, "clipwright or a library failed in a way that has no code of its own"),
    "E_STOPPED": (85, "stopped by SIGTERM or SIGUSR1 with the state saved"),
    "E_INTERRUPTED": (130, "stopped by Ctrl-C"),
    "E_PREP_EMPTY": (3, "no sample of the input could be written"),
    "E_IMG_PATH": (3, "an image path is missing or leaves the source's root"),
    "E_IMG_EMPTY": (3, "an image has no bytes"),
    "E_IMG_FORMAT": (3, "the bytes are not an image of an allowed format"),
    "E_IMG_TRUNCATED": (3, "an image is truncated or corrupt"),
    "E_IMG_DAMAGED": (3, "the data of a JPEG is damaged, so that some of its pixels would be guessed"),
    "E_IMG_PIXELS": (3, "an image exceeds the limits on pixels, side or aspect ratio"),
    "E_IMG_METADATA": (3, "the profile, EXIF or texts of an image exceed the limits on their size"),
    "E_IMG_FRAMES": (3, "an animation exceeds the limit on frames"),
    "E_TAR": (3, "a tar is malformed and cannot be read further"),
    "E_TAR_TRUNCATED": (3, "a tar is truncated"),
    "E_TAR_MEMBER": (3, "a tar member is a link or device, leaves its folder, or is too large"),
    "E_PAIR_DUPLICATE": (3, "the members of a key are not adjacent in a tar, or the key is used twice"),
    "E_PAIR_KEY": (3, "a key contains a dot, or a member's name is truncated"),
    "E_PAIR_IMAGE": (3, "a group of tar members has no image, or several"),
    "E_PAIR_LABEL": (3, "a .cls member of a tar holds neither a class number nor a class name"),
    "E_CAP_EMPTY": (3, "a sample has no caption"),
    "E_CAP_LONG": (3, "a caption exceeds the length limit"),
    "E_CAP_FILE": (3, "a caption file is missing, unreadable, unsafe or malformed"),
    "E_CAP_ENCODING": (3, "a caption is not valid Unicode text"),
}


class ClipwrightError(Exception):
    """An error that the user can act on.

    `what` states the failure, `where` names the culprit (file, row, key), `found` and `allowed` give what was found and
    what is allowed, `fix` what to do; `where`, `found` and `allowed` may be empty. The code decides the exit code.
    """

    # All parameters may be positional: unpickling (workers hand errors to their parent) calls `ClipwrightError(*args)`.
    def __init__(
        self, code: str, what: str, where: object = "", found: str = "", fix: str = "", allowed: str = ""
    ) -> None:
        assert code in CODES, code
        assert fix, f"{code} without a remedy"
        self.code, self.what, self.fix = code, what, fix
        self.where, self.found = shorten(str(where), _MAX_SEGMENT), shorten(found, _MAX_SEGMENT)
        self.allowed = shorten(allowed, _MAX_SEGMENT)
        super().__init__(code, what, self.where, self.found, fix, self.allowed)

    @classmethod
    def from_dict(cls, fields: dict[str, str]) -> ClipwrightError:
        """Returns the error that `to_dict` described."""
        return cls(**fields)

    def to_dict(self) -> dict[str, str]:
        """Returns the error as plain JSON data, for another process or rank."""
        return {name: getattr(self, name) for name in ("code", "what", "where", "found", "allowed", "fix")}

    @property
    def exit_code(self) -> int:
        return CODES[self.code][0]

    def __str__(self) -> str:
        return error_line(self.to_dict())


def error_line(fields: Mapping[str, str]) -> str:
    """Returns the error that `to_dict` described, or that a `status.json` states, as one line."""
    code, what, where, found, allowed, fix = (
        fields.get(name, "") for name in ("code", "what", "where", "found", "allowed", "fix")
    )
    found = f"{found} ({allowed})" if found and allowed else found or allowed
    line = " — ".join(segment for segment in (f"error[{code}]: {what}", where, found, fix) if segment)
    return " ".join(line.split())  # one line, even if a file name or a library's message has several
