"""The memory of this process, from /proc."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal


def used_memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes this process uses now (`VmRSS`), or has used at most (`VmHWM`), mapped pages included.

    getrusage would include the peak of the parent.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}; memory is measured on Linux")
    return int(match[1]) * 1024


def reset_peak() -> None:
    """Let `VmHWM` begin anew with what is used now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
