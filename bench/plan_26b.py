"""Time the plan of a 26B-A4B in NVFP4, expert by expert: 47,648 tensors, headers only.

    python bench/plan_26b.py

Prints the processor seconds of `inspect`'s report, the least of five, after a first one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import family

from cabochon.load.report import inspect_checkpoint


def seconds(folder: Path) -> float:
    start = time.process_time()
    report = inspect_checkpoint(folder)
    report.as_dict()
    report.text()
    assert report.loads
    return time.process_time() - start


def main() -> None:
    tensors = family.quantized(family.layout("26B-A4B"), family.nvfp4_calibrated)
    claim = family.claim("nvfp4-pack-quantized", family.FP4)
    described = family.config("26B-A4B") | {"quantization_config": claim}
    with tempfile.TemporaryDirectory() as folder:
        family.write_headers(Path(folder), tensors, described)
        times = [seconds(Path(folder)) for _ in range(6)]
    print(f"{len(tensors)} tensors: {min(times[1:]):.2f} s, the first {times[0]:.2f} s")


if __name__ == "__main__":
    main()
