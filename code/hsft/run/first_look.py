"""What `--check` and `--dry_run` keep of a model, made when it arrives rather than when they are asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from hsft.config.loader import load_config
from hsft.report.memory import saved_bytes_per_token
from hsft.run.check import Findings, check_item_model, check_user_model
from hsft.run.dry_run import training_shape

log = logging.getLogger(__name__)

_FILES = ("overall/LLM_ddp.yaml", "HLLM/HLLM.yaml")


def look_at_model(side: Literal["item", "user"], folder: Path) -> None:
    """Ask of a model what the checks ask, so that the records (`utils/records.py`) are there.

    They are those of the settings that HSFT comes with; others are looked at when they are used.
    What is wrong with the model is left for `--check` to say.

    Args:
        side: which LLM.
        folder: its folder.
    """
    given = {f"{side}_pretrain_dir": str(folder), "dataset": None}
    config, _ = load_config(_FILES, {**given, "use_qlora": side == "user"})
    findings = Findings()
    with findings.collect():
        if side == "item":
            check_item_model(config, findings)
        else:
            check_user_model(config, findings)
            saved_bytes_per_token(training_shape(config))
    for problem in findings.problems:
        log.debug("%s", problem)
