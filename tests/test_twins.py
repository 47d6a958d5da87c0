"""Kernels of a processor that this machine is not, under an emulator, against their scalar twin."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src/cabochon/kernels/csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", f"-I{SOURCES}", "-w", "-fno-math-errno", "-ffp-contract=off"]

missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]


@pytest.mark.skipif(platform.machine() == "aarch64", reason="test_kernels.py runs NEON itself here")
@pytest.mark.skipif(
    bool(missing),
    reason=f"{' and '.join(missing)} not installed (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_computes_what_its_scalar_twin_does(tmp_path: Path) -> None:
    def build(source: Path, name: str, *flags: str) -> str:
        made = str(tmp_path / name)
        command = [COMPILER, *FLAGS, *flags, "-c", str(source), "-o", made]
        subprocess.run(command, check=True, timeout=600)
        return made

    neon = ["-DCABOCHON_NEON", "-march=armv8.2-a+dotprod+fp16"]
    objects = [
        build(SOURCES / "isa.cpp", "scalar.o", "-O1", "-DCABOCHON_TABLE=cabochon_scalar"),
        build(SOURCES / "isa.cpp", "neon.o", "-O1", "-DCABOCHON_TABLE=cabochon_neon", *neon),
        *(
            build(SOURCES / f"{name}.cpp", f"{name}.o", "-O1")
            for name in ("pool", "backlog", "pack", "rotary")
        ),
        build(
            Path(__file__).parent / "twins/compare.cpp",
            "compare.o",
            "-O1",
            "-DCABOCHON_TWIN=cabochon_neon",
        ),
    ]
    program = str(tmp_path / "compare")
    subprocess.run([COMPILER, *objects, "-pthread", "-static", "-o", program], check=True)
    ran = subprocess.run(
        [EMULATOR, "-cpu", "max", program], capture_output=True, text=True, timeout=900, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr
    assert "6193 compared" in ran.stdout
