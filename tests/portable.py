"""The numeric tests as other machines run them: other instruction sets, other numbers of threads, our kernels.

`python tests/portable.py` runs them under every setting, `--today` under one, another each day of the year.
Exits with 1 if any failed, and says under which settings.
"""

import argparse
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

SETTINGS = (
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"CONSONAR_KERNELS": "ours"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "CONSONAR_KERNELS": "ours"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"},
    {"OMP_NUM_THREADS": "2"},
)
"""What is added to the environment; threads: 1 unless said."""

UNIT = (
    *("credit", "entropy", "evaluation_*", "generator_*", "guidance", "inception", "kernels", "losses"),
    *("optim", "policy", "float32", "quantizer", "reward_functions", "sampling", "tokenizer_*"),
)
"""Unit tests, beside three folders, whose numbers come out of products and sums."""


def numeric_tests() -> list[str]:
    root = Path(__file__).parent
    unit = {path for name in UNIT for path in root.glob(f"unit/test_{name}.py")}
    folders = [root / "contracts", root / "parity", root / "training", root / "interface" / "test_cli.py"]
    return [str(path) for path in [*folders, *sorted(unit)]]


def todays(day: int) -> dict[str, str]:
    """The setting of a day of the year, 1..366."""
    return SETTINGS[day % len(SETTINGS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--today", action="store_true", help="one setting, by the day of the year")
    today = parser.parse_args().today
    failed = []
    for setting in [todays(date.today().timetuple().tm_yday)] if today else SETTINGS:
        words = " ".join(f"{key}={value}" for key, value in setting.items())
        print(f"numeric tests under {words}", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", "not slow and not gpu", *numeric_tests()]
        if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **setting}).returncode:
            failed.append(words)
    if failed:
        sys.exit(f"numeric tests fail under: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
