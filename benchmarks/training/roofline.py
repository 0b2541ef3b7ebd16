"""What the machine can do at most: products of matrices, and copies of memory."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch


def median_seconds(call: Callable[[], object], seconds: float) -> float:
    """The median time of a call."""
    times: list[float] = []
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < 1.2 * seconds or len(times) < 3:
        call()
        if now - started > 0.2 * seconds:
            times.append(time.perf_counter() - now)
    return statistics.median(times)


def measure(rows: int, inputs: int, outputs: int, seconds: float) -> dict[str, float]:
    """GFLOP/s of (rows, inputs) x (inputs, outputs) in both types; GB/s, read and written.

    Args:
        seconds: that each is measured for, after a fifth of it as a warm-up.
    """
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        left, right = torch.randn(rows, inputs).to(dtype), torch.randn(inputs, outputs).to(dtype)
        out = torch.empty(rows, outputs, dtype=dtype)
        took = median_seconds(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), seconds)
        found[f"{name}_gflops"] = round(2e-9 * rows * inputs * outputs / took, 1)
    source = torch.ones(64 << 20)  # 256 MB: beyond any cache
    target = torch.empty_like(source)
    took = median_seconds(lambda: target.copy_(source), seconds)
    found["copy_gb_per_second"] = round(2e-9 * source.nbytes / took, 1)
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given.pop("threads"))
    print(json.dumps(measure(**given)))
