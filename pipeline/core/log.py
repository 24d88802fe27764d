"""No noise from libraries: what a person reads while a command runs is ours."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def silence_libraries(*, completely: bool = False) -> None:
    """Silences notices of libraries that ask nothing of the user: a warning that is shown needs action.

    completely: for --quiet, also their warnings and progress bars.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if completely:
        os.environ |= {
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",  # of worker processes
        }
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    for name in ("deepspeed", "DeepSpeed", "accelerate", "transformers", "torch.distributed", "webdataset"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)(\.|$)")
    warnings.filterwarnings("ignore", message=r".*untested.*optimizer.*")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the warnings and progress bars of transformers; what matters is raised as a ClipwrightError."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
