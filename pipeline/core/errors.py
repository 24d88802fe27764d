"""Coded errors: one line that says what, where, found and allowed, and what to do."""

from __future__ import annotations

# Every code clipwright can end with, and the exit code it ends with (2 config or command line, 3 input refused,
# 1 failed). Row-level codes (E_IMG_*, E_TAR_*, E_PAIR_*, E_CAP_*) also stand in rejects.parquet as the reason of a row.
CODES: dict[str, tuple[int, str]] = {
    "E_USAGE": (2, "the command line is not of the verb's form"),
    "E_CONFIG_FILE": (2, "a config file is missing or is not YAML"),
    "E_CONFIG_KEY": (2, "a config key that does not exist"),
    "E_CONFIG_CHOICE": (2, "a name that no registry entry bears"),
    "E_CONFIG_VALUE": (2, "a config value of the wrong type or range"),
    "E_PLUGIN": (2, "a plugin file that cannot be imported"),
    "E_BATCH": (2, "a global batch that the ranks cannot share evenly"),
    "E_WORLD": (2, "launchers' variables that contradict each other or are incomplete"),
    "E_HOSTFILE": (3, "a hostfile that is missing or not of its form"),
    "E_LAUNCH": (1, "ranks that could not be started, or ended without saying why"),
    "E_EXTRA": (2, "a package that an extra brings and that is not installed"),
    "E_CACHE": (2, "a cache that cannot hold the shards in use"),
    "E_OUTPUT": (2, "an output folder that holds something else"),
    "E_RESUME": (2, "an unfinished output made with another config"),
    "E_SYSTEM": (1, "the operating system refused: disk full, no permission, a file where a folder should be"),
    "E_INPUT": (3, "an input file or folder that is missing or unreadable"),
    "E_TABLE": (3, "a table that cannot be read"),
    "E_COLUMN": (3, "a column that a table does not have"),
    "E_MANIFEST": (3, "a folder without a manifest, or with one of another kind or version"),
    "E_DATA_HASH": (3, "a shard or sample that is not what its manifest says"),
    "E_DATA_SMALL": (3, "a dataset with fewer samples than needed"),
    "E_BAD_SAMPLES": (3, "a dataset of which too many samples cannot be read"),
    "E_REMOTE": (3, "a remote file that cannot be fetched or written"),
    "E_CLASSES": (3, "classes and labels that do not fit each other"),
    "E_MODEL_HASH": (3, "a model file that is not what its manifest says"),
    "E_MODEL_SHAPE": (3, "weights that do not fit the model's config"),
    "E_IMPORT": (3, "a foreign model folder that states too little, contradicts itself or cannot be taken over"),
    "E_PARITY": (1, "an imported model that does not compute what its source does"),
    "E_MODEL_DIM": (3, "a model whose embedding dimension differs from the index's"),
    "E_UNSAFE": (3, "a file that could run code where only data belongs"),
    "E_FINGERPRINT": (3, "artefacts made with different models"),
    "E_UNFINISHED": (3, "work in steps or parts of which one is missing or did not finish"),
    "E_EMBED_HASH": (3, "an embedding file that is not what its manifest says"),
    "E_INDEX_HASH": (3, "an index file that is not what its manifest says"),
    "E_INDEX_ROWS": (3, "vectors and rows that differ in number, ids or dimension"),
    "E_CKPT_NONE": (3, "a checkpoint that was asked for and is missing"),
    "E_CKPT_HASH": (3, "a checkpoint file that is not what its manifest says"),
    "E_DISK": (1, "a disk without room for a checkpoint"),
    "E_DOCTOR": (1, "a check of doctor that failed"),
    "E_NONFINITE": (1, "a loss, gradient or embedding that is not finite"),
    "E_WORKER": (1, "a worker process that died"),
    "E_RANK": (1, "a rank that died, is stopped or is cut off"),
    "E_HANG": (1, "a rank that does not get on"),
    "E_UNSAVED": (1, "a run that was told to stop and could not save in time"),
    "E_PREP_EMPTY": (3, "an input of which no sample could be written"),
    "E_IMG_PATH": (3, "an image path that is missing or leaves the source's root"),
    "E_IMG_EMPTY": (3, "an image of no bytes"),
    "E_IMG_FORMAT": (3, "bytes that are not an image of an allowed format"),
    "E_IMG_TRUNCATED": (3, "an image that is cut off or broken"),
    "E_IMG_PIXELS": (3, "an image beyond the pixel, side or aspect limits"),
    "E_TAR": (3, "a tar that cannot be read on"),
    "E_TAR_TRUNCATED": (3, "a tar that is cut off"),
    "E_TAR_MEMBER": (3, "a tar member that is a link or device, leads out of a folder, or is too large"),
    "E_PAIR_DUPLICATE": (3, "a key whose members stand apart in a tar, or that is used again"),
    "E_PAIR_KEY": (3, "a key with a dot in it, or a member's name that was cut off"),
    "E_PAIR_IMAGE": (3, "a group of tar members with no image, or with several"),
    "E_CAP_EMPTY": (3, "a sample without a caption"),
    "E_CAP_LONG": (3, "a caption beyond the length limit"),
    "E_CAP_FILE": (3, "a caption file that is missing, unreadable, unsafe or not of its form"),
    "E_CAP_ENCODING": (3, "a caption that is not valid Unicode text"),
}


class ClipwrightError(Exception):
    """An error a user can act on.

    `what` names the failure, `where` the culprit (file, row, key), `found` what was found and what is allowed,
    `fix` what to do. The code decides the exit code.
    """

    def __init__(self, code: str, what: str, *, where: object, found: str, fix: str) -> None:
        assert code in CODES, code
        super().__init__(code, what, str(where), found, fix)
        self.code, self.what, self.where, self.found, self.fix = code, what, str(where), found, fix

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, self.args  # worker processes hand errors to their parent

    @property
    def exit_code(self) -> int:
        return CODES[self.code][0]

    def __str__(self) -> str:
        line = f"error[{self.code}]: {self.what} — {self.where} — {self.found} — {self.fix}"
        return " ".join(line.split())  # one line, whatever a file name or a library's message holds


def _remake(code: str, what: str, where: str, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError(code, what, where=where, found=found, fix=fix)
