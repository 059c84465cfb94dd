"""The tests that need a GPU, in a process of their own."""

import contextlib
import importlib.util
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

from gpu.bench import Bench
from gpu.plan import Row, Wrong
from gpu.record import ROOT, shorten

SECTION = "tests"
WORKERS = 3  # processes of the tests
MARK = re.compile(r"\bmark\.cuda\b")


def rows(limit: float, seconds: float = 75) -> list[Row]:
    """The row of the tests.

    Args:
        limit: seconds after which the tests are interrupted; those that ran count.
        seconds: that they are expected to take.
    """
    return [Row(SECTION, "pytest -m cuda", partial(run_tests, limit=limit), min(seconds, limit))]


def marked_files() -> list[str]:
    """The files with tests for a GPU; only they are imported, since others want packages that may be missing."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if MARK.search(file.read_text(encoding="utf-8"))]


def run_tests(bench: Bench, limit: float) -> dict[str, Any]:
    """Counts of passed, failed and skipped tests, and the messages of those that failed."""
    bench.close()
    files = marked_files()
    if not files:
        if bench.cuda:
            raise RuntimeError("no test carries the mark cuda")
        return {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "failures": {}, "interrupted": False}
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder, "tests.xml"), Path(folder, "output.txt")
        options = ["-m", "cuda", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if bench.cuda and all(importlib.util.find_spec(name) for name in ("xdist", "execnet")):
            options += ["-n", str(WORKERS)]  # much of their time is compiling
        began = time.perf_counter()
        code, interrupted = _run([sys.executable, "-m", "pytest", *options, *files], output, limit)
        told = shorten(output.read_text(encoding="utf-8", errors="replace"))
        if not report.exists():
            raise RuntimeError(f"pytest ended with {code} and no report:\n{told[-1500:]}")
        result = parse_report(report.read_text(encoding="utf-8"))
        if interrupted:  # the test that ran then is in the report, as if it had passed
            result["passed"] = max((int(count) for count in re.findall(r"(\d+) passed", told)), default=0)
    result |= {"seconds": time.perf_counter() - began, "interrupted": interrupted, "code": code, "end": told[-1500:]}
    if result["failed"] or result["errors"] or interrupted or code not in (0, 5):
        what = f"interrupted after {limit:.0f} s" if interrupted else f"pytest ended with {code}"
        counts = f"{result['passed']} passed, {result['failed']} failed, {result['errors']} errors"
        raise Wrong(f"{what}: {counts}", result)
    return result


def _run(command: list[str], output: Path, limit: float) -> tuple[int, bool]:
    """Exit code of a command, and whether it was interrupted: pytest then still reports what it has."""
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(limit), False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return -signal.SIGINT, True
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def parse_report(text: str) -> dict[str, Any]:
    """Counts, and the first lines of the messages of tests that failed, of a JUnit report."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
    failures, slowest = {}, {}
    for case in cases:
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        kinds = {child.tag: child for child in case}
        kind = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), None)
        counts[{"failure": "failed", "error": "errors", "skipped": "skipped", None: "passed"}[kind]] += 1
        slowest[name] = float(case.get("time") or 0)
        if kind in ("failure", "error"):
            failures[name] = shorten(kinds[kind].get("message") or kinds[kind].text or "")[:500]
    longest = dict(sorted(slowest.items(), key=lambda item: -item[1])[:5])
    return {**counts, "failures": failures, "slowest_seconds": longest}
