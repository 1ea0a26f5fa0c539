"""What a file says about the repair that it comes from, and what follows for its scan.

A file may say anything: no verdict rests on it. A scan heeds the model before a repair only if the
user names that model.
"""

from __future__ import annotations

from ..checkpoints import Checkpoint
from ..detect.result import ScanResult
from ..detect.statistics import FINDINGS
from ..errors import CheckpointError
from ..reporting.values import clean_text


def doubts_of_repair(
    found: ScanResult, metadata_of: Checkpoint, before: Checkpoint | None
) -> tuple[str, ...]:
    """Return one line if the file does not fit the model before the repair, or names one.

    metadata_of: The checkpoint that was scanned; its weights are not needed. before: The model
    before the repair; None if the user has named none.
    """
    try:
        made = metadata_of.provenance
    except CheckpointError:
        made = None
    source = None if made is None else made.source_sha256
    if before is None:
        judged_alone = found.verdict in FINDINGS and found.objective == "targeted"
        if made is None or source is None or not judged_alone:
            return ()
        return (
            f"{found.name}: its file says that it is a repair of "
            f"{clean_text(str(made.source_name))}. If you repaired it, name that model (before=): "
            "a repair may let clean classes stand out, and then they do not count",
        )
    if source == before.sha256:
        return ()
    return (
        f"{found.name}: its file does not say that it is a repair of {before.name}; expected is "
        "the model before its repair (before=), beside which clean classes do not count",
    )
