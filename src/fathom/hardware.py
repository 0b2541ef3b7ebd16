"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import resource
import sys


def hardware() -> str:
    """Processor, cores and accelerator in words."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"{platform.machine()}, {cores} cores", f"Python {platform.python_version()}"]
    words.append(f"torch {torch.__version__}")
    words.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator")
    return ", ".join(words)


def peak_memory_mb() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20) if sys.platform == "darwin" else peak // (1 << 10)
