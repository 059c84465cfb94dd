"""scripts/gpu_check.sh on a CPU: every section on tiny models, and whatever can go wrong in the one call on a GPU."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu import __main__ as program
from gpu import ahead, baselines, checks, plan, record, report, training
from gpu.bench import Bench
from gpu.models import cases
from gpu.plan import Clock, Plan, Row, Wrong
from gpu.rows import SECTIONS, all_rows

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--tiny")


def script(*arguments, **environment) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def load(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """One call of the whole program."""
    out = tmp_path_factory.mktemp("gpu")
    done = script(*TINY, "--out", str(out), "--minutes", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(out=out, told=done.stdout, data=load(out))


@pytest.mark.slow
def test_every_section_runs(tiny):
    rows = tiny.data["rows"]
    assert {key.split("/")[0] for key in rows} == {"probe", *SECTIONS}
    assert all(row["status"] == "ok" for row in rows.values()) and not tiny.data["runs"][0]["left_out"]
    assert sorted(path.name for path in tiny.out.iterdir()) == ["gpu.json"]
    assert f"results are in {tiny.out}/gpu.json" in tiny.told and "--missing" not in tiny.told
    assert "training: share of the matmul rate" in tiny.told


@pytest.mark.slow
def test_whole_runs_find_what_latency_compiled(tiny):
    """On a GPU a second compilation would take a minute of eight."""
    results = {key: row["result"] for key, row in tiny.data["rows"].items()}
    for name, forms in (("DiT-XL/2 256 | 8 | bf16 | graphs", 3), ("Latte T2V 16x512 | 1 | bf16 | graphs", 2)):
        assert results[f"latency/{name}"]["compiled"]["graphs"] == forms  # a full step, and one for each branch
        assert results[f"end-to-end/{name}"]["compiled"]["graphs"] == 0


@pytest.mark.slow
def test_numbers_make_sense(tiny):
    results = {key: row["result"] for key, row in tiny.data["rows"].items()}
    step = results["latency/DiT-XL/2 256 | 8 | bf16 | compiled"]
    assert step["off_eager"]["full"] < 0.02 and 0 < step["seconds"]["full"] < 10
    runs = results["end-to-end/Hunyuan-DiT 1024 | 1 | bf16 | eager"]["runs"]
    assert runs["none"]["cached_steps"] == 0 < runs["N2-700-50"]["cached_steps"] < runs["N4-700-50"]["cached_steps"]
    assert 1 < runs["N2-700-50"]["flops_speedup"] < runs["N4-700-50"]["flops_speedup"]
    assert all(run["finite"] for run in runs.values())
    errors = results["precision/Latte T2V 16x512"]["errors"]
    assert 1e-4 < errors["fp16"] < errors["bf16"] < 3e-2
    frozen, scratch = (results[f"training/{name}"] for name in ("stage 1 checkpointed", "scratch"))
    assert 0 < frozen["flops"] < scratch["flops"] and scratch["images_per_second"] > 0


@pytest.mark.slow
def test_report_of_a_cpu_is_the_page_without_a_card(tiny, tmp_path):
    """That is what the repository has until there was a card; from then on, the page that docs/gpu.json makes."""
    assert program.main(["report", str(tiny.out), "--out", str(tmp_path / "gpu.md")]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith(report.NO_CARD) and not (tmp_path / "gpu.json").exists()
    known = ROOT / "docs/gpu.json"
    expected = report.page(json.loads(known.read_text())) if known.exists() else page
    assert (ROOT / "docs/gpu.md").read_text() == expected


def quick(section="latency", name="a", seconds=0.1, **more) -> Row:
    return Row(section, name, more.pop("measure", lambda bench: {"value": 1}), seconds, **more)


def call(monkeypatch, out, rows, *arguments) -> int:
    monkeypatch.setattr(program, "all_rows", lambda tiny, limit: rows)
    monkeypatch.setattr(program, "quiet", lambda: None)
    return program.main([*TINY, "--out", str(out), *arguments])


def test_rows_without_time_are_left_out(monkeypatch, tmp_path, capsys):
    rows = [quick(name="short"), quick(name="long", seconds=1000), quick(name="last", seconds=2)]
    assert call(monkeypatch, tmp_path, rows, "--minutes", "1") == 0
    told, data = capsys.readouterr().out, load(tmp_path)
    assert list(data["rows"]) == ["latency/short", "latency/last"]
    assert data["runs"][0]["left_out"] == ["latency/long"]
    assert "left out for lack of time: latency/long" in told and "gpu_check.sh --missing" in told


@pytest.mark.slow
def test_only_and_missing_go_on_with_the_same_file(monkeypatch, tmp_path):
    def fail(bench):
        raise ValueError("not yet")

    rows = [quick(name="good"), quick(name="bad", measure=fail), quick("training", "other")]
    assert call(monkeypatch, tmp_path, rows, "--only", "latency") == 1
    before = load(tmp_path)["rows"]
    assert set(before) == {"latency/good", "latency/bad"}
    time.sleep(1)  # runs are told apart by the second
    rows[1] = quick(name="bad")
    assert call(monkeypatch, tmp_path, rows, "--missing") == 0
    after = load(tmp_path)["rows"]
    assert after["latency/good"] == before["latency/good"]
    assert after["latency/bad"]["status"] == "ok" and set(after) == {*before, "training/other"}
    assert len(load(tmp_path)["runs"]) == 2


@pytest.mark.slow
def test_a_row_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def memory(bench):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def missing(bench):
        import no_such_package  # noqa: F401

    def wrong(bench):
        raise Wrong("outputs are not finite", {"seconds": 3})

    rows = [quick(name=f.__name__, measure=f) for f in (memory, missing, wrong)] + [quick(name="good")]
    assert call(monkeypatch, tmp_path, rows) == 1
    data, told = load(tmp_path)["rows"], capsys.readouterr().out
    assert data["latency/memory"]["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert (
        "no_such_package" in data["latency/missing"]["error"] and "test_gpu_check" in data["latency/missing"]["trace"]
    )
    assert data["latency/wrong"]["result"] == {"seconds": 3} and data["latency/wrong"]["status"] == "failed"
    assert data["latency/good"]["status"] == "ok"
    assert "failed: latency/wrong: outputs are not finite" in told


@pytest.mark.slow
def test_a_row_that_hangs_is_ended(tmp_path):
    keeper = record.Record(tmp_path, record.describe_machine(CPU, True))
    keeper.begin({"id": "now"})
    Plan(Bench(CPU, True), keeper, Clock(8)).run_row(quick(measure=lambda bench: time.sleep(60)), limit=1)
    assert "took longer than 1 s" in keeper.data["rows"]["latency/a"]["error"]


def test_after_an_error_that_lasts_the_process_starts_anew(monkeypatch, tmp_path):
    """An illegal access leaves a CUDA context useless: what comes behind needs another process."""

    class Started(Exception):
        pass

    def execve(path, arguments, environment):
        started.append(environment)
        raise Started

    def fail(bench):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    started: list[dict] = []
    monkeypatch.setattr(plan, "usable", lambda device: False)
    monkeypatch.setattr(plan.os, "execve", execve)
    rows = [quick(name="before"), quick(name="bad", measure=fail), quick(name="behind")]
    with pytest.raises(Started):
        call(monkeypatch, tmp_path, rows)
    before = load(tmp_path)
    monkeypatch.setenv("GPU_CHECK_RUN", started[0]["GPU_CHECK_RUN"])
    assert call(monkeypatch, tmp_path, rows) == 1  # that something failed is not forgotten
    after = load(tmp_path)
    assert after["rows"]["latency/before"] == before["rows"]["latency/before"]
    assert after["rows"]["latency/behind"]["status"] == "ok" and len(after["runs"]) == 1


def test_a_process_that_does_not_end_is_ended(monkeypatch):
    ended, told = threading.Event(), []
    monkeypatch.setattr(plan, "GRACE", -1000)
    monkeypatch.setattr(plan.os, "_exit", lambda code: code == 3 and ended.set())
    with plan.end_if_stuck(Clock(0), lambda: told.append("table")):
        assert ended.wait(10) and told == ["table"]


@pytest.mark.slow
def test_a_process_whose_check_ended_by_an_error_lives_on(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(plan, "GRACE", -1000)
    monkeypatch.setattr(plan.os, "_exit", lambda code: ended.set())
    with pytest.raises(RuntimeError), plan.end_if_stuck(Clock(0), lambda: None):
        raise RuntimeError
    assert not ended.wait(2)


def test_slower_machines_leave_out_more(tmp_path):
    keeper = record.Record(tmp_path, record.describe_machine(CPU, True))
    keeper.begin({"id": "now"})
    slow = Plan(Bench(CPU, True), keeper, Clock(8))
    slow.run([quick(name=str(i), seconds=0.01, measure=lambda bench: time.sleep(0.05) or {}) for i in range(3)])
    assert slow.need(quick(seconds=10)) > 40


def test_what_is_compiled_ahead_or_in_memory_needs_less_time(tmp_path):
    bench = Bench(CPU, True)
    todo = Plan(bench, record.Record(tmp_path, record.describe_machine(CPU, True)), Clock(8))
    row = quick(seconds=5, form="f", tracing=10, compiling=40)
    assert todo.expected(row) == 55
    todo.compiled.add("f")
    assert todo.expected(row) == 15
    bench.form = "f"
    assert todo.expected(row) == 5


def test_results_of_another_machine_move_aside(tmp_path, capsys):
    machine = record.describe_machine(CPU, True)
    record.Record(tmp_path, machine | {"card": "another card"}).save()
    record.Record(tmp_path, machine).save()
    assert len(list(tmp_path.glob("gpu-*.json"))) == 1 and load(tmp_path)["machine"] == machine
    (tmp_path / "gpu.json").write_text("{ cut off")
    assert record.Record(tmp_path, machine).data["rows"] == {}


def test_children_compile_ahead(monkeypatch):
    code = {"good": "pass", "bad": "raise SystemExit('no compiler')", "long": "import time; time.sleep(60)"}
    monkeypatch.setattr(ahead.Ahead, "command", lambda self, key: [sys.executable, "-c", code[key.split("/")[1]]])
    rows = [quick(name=name, form=name) for name in ("good", "bad", "long")] + [quick(name="good", form="good")]
    children = ahead.Ahead(rows, workers=2, arguments=[])
    began = time.monotonic()
    while len(children.done) + len(children.failed) < 2 and time.monotonic() < began + 60:
        time.sleep(0.1)
    children.finish(0)
    assert children.done == {"good"} and children.failed["bad"] == "no compiler"
    assert time.monotonic() < began + 55


@pytest.mark.slow
def test_training_leaves_the_settings_that_compiled_code_goes_by():
    """Of the caches on disk: a child process that compiles ahead for a later row has trained nothing."""
    torch.backends.cuda.matmul.allow_tf32 = True
    bench = Bench(CPU, tiny=True)
    assert not torch.backends.cuda.matmul.allow_tf32
    training.train(bench, cases(tiny=True)["DiT"], training.Stage("scratch"), 2, training.Pace(1))
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_child_compiles_its_row(monkeypatch):
    compiled = []
    rows = [quick(name="a"), quick(name="b", compile=lambda bench: compiled.append(bench.device))]
    monkeypatch.setattr(program, "all_rows", lambda tiny, limit: rows)
    monkeypatch.setattr(program, "quiet", lambda: None)
    assert program.main(["compile", "latency/b", *TINY]) == 0 and compiled == [CPU]


@pytest.mark.parametrize("kind", ["DiT", "LatteT2V", "HunyuanDiT"])
@torch.no_grad()
def test_baselines_compute_the_same(kind):
    ours, theirs = baselines.baseline_of(cases(tiny=True)[kind], CPU, torch.float32, rows=2)
    out = ours.call()
    assert out.std() > 0.01
    torch.testing.assert_close(theirs.call(), out, rtol=0, atol=1e-5)


def test_full_rows_are_what_was_asked_for():
    rows = {row.key for row in all_rows(tiny=False, tests_limit=100)}
    for case in cases().values():
        for batch in case.batches:
            for dtype in ("bf16", "fp16"):
                for mode in ("eager", "compiled", "graphs"):
                    assert f"latency/{case.name} | {batch} | {dtype} | {mode}" in rows
    for name in ("scratch", "scratch compiled", "scratch compiled checkpointed", "stage 1 compiled", "stage 2"):
        assert f"training/{name}" in rows


@pytest.mark.parametrize(("compiled", "reached"), [(True, "Latte T2V 16x512 | 1 | bf16 | graphs"), (False, "stage 2")])
def test_what_matters_fits_into_eight_minutes(compiled, reached, tmp_path):
    """By the expected times: everything that is compiled once, or without help all that is eager and DiT's steps."""
    bench, spent = Bench(CPU, True), 25.0  # until torch is imported
    todo = Plan(bench, record.Record(tmp_path, record.describe_machine(CPU, True)), Clock(8))
    rows = all_rows(tiny=False, tests_limit=100)
    todo.compiled = {row.form for row in rows} if compiled else set()
    for row in rows:
        spent += todo.expected(row)
        bench.form = row.form or bench.form
        if row.name == reached:
            break
    assert spent < 8 * 60 - plan.RESERVE


def test_the_batch_is_halved_until_it_fits(monkeypatch):
    def train(bench, case, stage, batch, pace):
        if batch > 16:
            raise torch.OutOfMemoryError
        pace.times = [0.0, 9.0, 9.5, 10.0, 10.5, 11.0, 11.5]
        return pace, 7

    monkeypatch.setattr(training, "train", train)
    bench = Bench(CPU)
    result = training.measure_training(bench, cases(tiny=True)["DiT"], training.Stage("scratch"))
    assert bench.training_batch == 16  # the next row begins there
    assert result["batch"] == 16 and result["seconds"] == 0.5 and result["images_per_second"] == 32


def test_the_largest_batch_is_tried_out(monkeypatch):
    """States of 100 bytes and 10 for each image; a little more above 80 images, as allocators do."""
    tried = []

    def train(bench, case, stage, batch, pace):
        tried.append(batch)
        if 100 + 10 * batch + (30 if batch > 80 else 0) > 1000:
            raise torch.OutOfMemoryError
        return pace, 100 + 10 * batch

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    bench = Bench(CPU)
    monkeypatch.setattr(bench, "close", lambda: None)
    bench.cuda = True
    result = training.find_largest(bench, cases(tiny=True)["DiT"], training.Stage("scratch"))
    assert result["bytes_per_image"] == 10 and result["bytes_of_states"] == 100
    assert tried == [8, 24, 84, 76] or tried == [8, 24, 84], tried
    assert result["batch"] == tried[-1]


def test_events_are_read_after_the_last_call(monkeypatch):
    """The stopwatch on a GPU, with a device whose clock is a counter."""
    clock, synchronized = [0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            assert synchronized[-1] == clock[0]
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: synchronized.append(clock[0]))
    bench = Bench(CPU)
    bench.cuda = True
    timing = bench.time(lambda: clock.__setitem__(0, clock[0] + 2), warm_up=2)
    assert timing.median == 2e-3 and timing.spread == 0 and timing.calls == 60


def test_counts_of_the_tests():
    case = '<testcase classname="tests.test_cuda" name="{}" time="1.5">{}</testcase>'
    parts = [case.format("a", ""), case.format("b", '<failure message="AssertionError: off by 3">...</failure>')]
    parts += [case.format("c", '<skipped message="no CUDA GPU"/>'), case.format("d", '<error message="no fixture"/>')]
    result = checks.parse_report(f"<testsuites><testsuite>{''.join(parts)}</testsuite></testsuites>")
    assert [result[kind] for kind in ("passed", "failed", "skipped", "errors")] == [1, 1, 1, 1]
    assert result["failures"] == {"test_cuda::b": "AssertionError: off by 3", "test_cuda::d": "no fixture"}
    assert "tests/project/test_cuda.py" in checks.marked_files()


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["pytest", "sentencepiece"])
def test_packages_that_tests_lack_are_told(missing, monkeypatch, tmp_path):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{missing}'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=f"(?s)pytest ended with .*No module named '{missing}'"):
        checks.run_tests(Bench(CPU), limit=300)


@pytest.mark.slow
def test_tests_that_take_too_long_are_interrupted(monkeypatch, tmp_path):
    """With what they have by then."""
    (tmp_path / "tests").mkdir()
    code = "import time, pytest\n@pytest.mark.cuda\ndef test_short(): pass\n"
    code += "@pytest.mark.cuda\ndef test_long(): time.sleep(60)\n"
    (tmp_path / "tests/test_it.py").write_text(code)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["cuda"]\n')
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    with pytest.raises(Wrong, match="interrupted after 10 s: 1 passed") as told:
        checks.run_tests(Bench(CPU), limit=10)
    assert told.value.result["interrupted"] and told.value.result["passed"] == 1


def results_of_a_card() -> dict:
    """Made up: 100 TFLOP/s, a full step of 64 images of 32 TFLOP in 0.5 s."""
    steps = {"model": report.DIT, "batch": 64, "dtype": "bf16", "branches": [4, 1], "peak_bytes": 2**31}
    flops = {"full": 32e12, "4": 9e12, "1": 2.4e12}
    eager = steps | {"mode": "eager", "flops": flops, "seconds": {"full": 0.9, "4": 0.3, "1": 0.1}}
    compiled = steps | {"mode": "compiled", "flops": flops, "seconds": {"full": 0.5, "4": 0.15, "1": 0.04}}
    baseline = {"model": report.DIT, "batch": 64, "dtype": "bf16", "mode": "eager", "baseline": "timm"}
    baseline |= {"seconds": {"ours": 0.85, "theirs": 1.0}, "difference": 2e-3}
    trained = {"stage": "scratch", "compile": True, "checkpointing": False, "batch": 64, "seconds": 1.0}
    trained |= {"images_per_second": 64, "flops": 48e12, "peak_bytes": 2**35}
    tested = {"passed": 40, "failed": 1, "errors": 0, "skipped": 2, "failures": {"a::b": "off"}, "interrupted": False}
    run = {"full_steps": 50, "cached_steps": 0, "seconds_per_sample": 3, "speedup": 1, "flops_speedup": 1}
    run |= {"peak_bytes": 2**32}
    precise = {"model": report.DIT, "errors": {"tf32": 1e-4, "bf16": 8e-3, "fp16": 1e-3}, "finite": {"fp16": True}}
    precise |= {"stream": {"fp32": {"largest": 12.5}}}
    results = {
        "probe/rates": {"side": 8192, "flops_per_second": {"bf16": 100e12}, "copy_bytes_per_second": 3e12},
        "tests/pytest -m cuda": tested,
        "latency/a": eager,
        "latency/b": compiled,
        "latency/baseline": baseline,
        "end-to-end/a": {"model": report.DIT, "batch": 8, "dtype": "bf16", "mode": "graphs", "runs": {"none": run}},
        "training/scratch compiled": trained,
        "training/largest batch, scratch compiled": {"stage": "scratch compiled", "batch": 96, "tried": {"96": True}},
        "precision/a": precise,
    }
    rows = {key: {"status": "ok", "result": result} for key, result in results.items()}
    rows["latency/c"] = {"status": "failed", "error": "OutOfMemoryError: CUDA out of memory\nmore"}
    machine = {"device": "cuda", "tiny": False, "card": "Some Card", "driver_version": "1.2", "cuda": "13.0"}
    machine |= {"torch": "2.11", "python": "3.12", "code": "abc", "date": "2026-01-01"}
    return {"machine": machine, "rows": rows, "runs": [{"id": "now", "left_out": ["latency/d", "latency/a"]}]}


def test_page_of_a_card(tmp_path):
    data = results_of_a_card()
    aims = report.aims(data)
    assert [aim.measured for aim in aims] == pytest.approx([0.64, 2.0, 0.3 / (9 / 32), None, 0.48])
    assert [aim.met for aim in aims] == [True, True, True, None, True]
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "docs/gpu.md")]) == 0
    page = (tmp_path / "docs/gpu.md").read_text()
    assert page.startswith("# On a GPU: Some Card\n") and "driver 1.2" in page
    for line in (
        f"| {report.DIT} | 64 | bf16 | compiled | 500 | 64% | 150 (b4), 40 (b1) | 1.07 (b4), 1.07 (b1) | 2.0 |",
        f"| {report.DIT} | 64 | bf16 | eager | timm | 1000 | 850 | 1.18 | 2.0e-03 |",
        f"| {report.DIT} | 8 | bf16 | graphs | uncached | 50 + 0 | 3 | 1.00 | 1.00 | 4.0 |",
        "| scratch compiled | 64 | 64 | 1000 | 48% | 32.0 | 96 |",
        f"| {report.DIT} | 1.0e-04 | 8.0e-03 | 1.0e-03 | yes | 12.5 |",
        "- `latency/c`: OutOfMemoryError: CUDA out of memory",
        "- `latency/d`",
        "`pytest -m cuda`: 40 passed, 1 failed, 0 errors, 2 skipped.",
    ):
        assert f"\n{line}\n" in page, line
    assert "- `latency/a`" not in page  # measured by another call
    assert report.page(json.loads((tmp_path / "docs/gpu.json").read_text())) == page
    assert report.main([str(tmp_path / "nowhere")]) == 2


def test_a_report_of_hardly_anything():
    data = results_of_a_card()
    for keep in ([], ["latency/b"], ["training/scratch compiled"]):
        rows = {key: data["rows"][key] for key in keep}
        assert "not measured" in report.summary(data | {"rows": rows}, Path("x"))
        assert report.page(data | {"rows": rows})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named(capsys):
    assert program.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A folder with a wheel of this package, of a version of its own and without weights, and with a broken one."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("src", "configs", "class-to-image", "class-to-video", "text-to-video", "text-to-image"):
        ignored = shutil.ignore_patterns("weights", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    init = source / "src/skipdit/__init__.py"
    init.write_text(init.read_text() + '\n__version__ = "99"\n')
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, *build, str(source)], check=True, capture_output=True)
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    return folder


@pytest.mark.slow
def test_wheels_take_the_place_of_packages(wheels, tmp_path):
    done = script(*TINY, "--out", str(tmp_path), "--minutes", "0", WHEELS=str(wheels))
    assert done.returncode == 0, done.stdout + done.stderr
    assert load(tmp_path)["machine"]["skipdit"] == "99, other code than this checkout's"
    assert "broken-1.0-py3-none-any.whl could not be installed" in done.stderr
    assert not load(tmp_path)["rows"] and len(load(tmp_path)["runs"][0]["left_out"]) > 10


@pytest.mark.slow
def test_without_an_installed_package_the_checkout_is_used(tmp_path):
    """Neither an editable install nor a wheel: the machine that has PyTorch and nothing of ours."""
    hide = (
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    hide += "sys.path[:] = [p for p in sys.path if not p.endswith('/src')]\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    done = script(*TINY, "--out", str(tmp_path), "--minutes", "0", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "other code" not in load(tmp_path)["machine"]["skipdit"]


def test_tiny_cases_are_of_the_same_classes():
    for small, full in zip(cases(tiny=True).values(), cases().values(), strict=True):
        assert replace(small, settings={}, branches=(), window="", steps=0) == replace(
            full, settings={}, branches=(), window="", steps=0
        )
