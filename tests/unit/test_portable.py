"""What `make test-portable` runs, and continuous integration a part of."""

import os
import subprocess
from pathlib import Path

import portable

ROOT = Path(__file__).parents[2]


def test_every_day_has_a_setting_and_a_year_has_all():
    assert [portable.todays(day) for day in (1, 2)] == list(portable.SETTINGS[1:3])
    year = [portable.todays(day) for day in range(1, 367)]
    assert all(setting in year for setting in portable.SETTINGS)
    switches = {(key, value) for setting in portable.SETTINGS for key, value in setting.items()}
    assert switches >= {
        ("ATEN_CPU_CAPABILITY", "default"), ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "SSE41"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_CBWR", "COMPATIBLE"), ("OMP_NUM_THREADS", "2"),
    }  # fmt: skip


def test_the_numeric_tests_are_there():
    tests = portable.numeric_tests()
    assert all(Path(test).exists() for test in tests) and len(tests) == len(set(tests)) > 20
    for name in portable.UNIT:
        assert list((ROOT / "tests" / "unit").glob(f"test_{name}.py")), name


def run_ci(tmp_path: Path, make: str) -> subprocess.CompletedProcess:
    """`.ci/run` beside a Makefile of ours."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text(make)
    # `make test` runs this test: a make below another says more lines.
    outside = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["bash", str(script)], capture_output=True, text=True, env=outside)


def test_continuous_integration_ends_with_the_closing_line_of_make_test(tmp_path):
    done = run_ci(tmp_path, "test:\n\t@echo 12 passed in 1s\ntest-portable:\n\t@echo 3 passed $(WHEN)\n")
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "12 passed in 1s",
        "3 passed --today",
        "12 passed in 1s",
    ]


def test_continuous_integration_fails_when_either_fails(tmp_path):
    for name, make in {
        "first": "test:\n\t@false\ntest-portable:\n\t@true\n", "second": "test:\n\t@true\ntest-portable:\n\t@false\n"
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        assert run_ci(tmp_path / name, make).returncode != 0
