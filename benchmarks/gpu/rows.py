"""All rows, most important first.

Seconds are guesses for an H100 with sixteen cores. A row that wants the same model in the same form as the one before
finds it there, compiled: a sampling run follows the latency of its model and mode.
"""

from dataclasses import replace

from gpu import checks, end_to_end, latency, precision, probe, training
from gpu.models import Case, cases
from gpu.plan import Row
from gpu.training import Stage

SECTIONS = ("tests", "latency", "end-to-end", "training", "precision")
STEPS = {"DiT": 5, "Latte": 6, "LatteT2V": 9, "HunyuanDiT": 9}  # seconds of a latency row
RUNS = {"DiT": 9, "Latte": 11, "LatteT2V": 36, "HunyuanDiT": 14}  # of whole runs
TRACING = {"DiT": 10, "Latte": 11, "LatteT2V": 17, "HunyuanDiT": 14}  # besides, if compiled ahead
COMPILING = {"DiT": 40, "Latte": 40, "LatteT2V": 80, "HunyuanDiT": 60}  # besides, if not


def all_rows(tiny: bool, tests_limit: float) -> list[Row]:
    """The rows of every section, and that of the card's limits.

    Args:
        tests_limit: seconds for the tests.
    """
    make = _Rows(cases(tiny))
    rows = [*probe.rows(), *checks.rows(tests_limit), *(_tiny_rows(make) if tiny else _full_rows(make))]
    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(row.key, row)
    return list(unique.values())


def _tiny_rows(make: "_Rows") -> list[Row]:
    """Rows that run every line of the program."""
    rows = [
        *make.latency("DiT", (8,), "bf16", "eager"),
        *make.latency("DiT", (8,), "bf16", "compiled"),
        *make.latency("DiT", (8,), "bf16", "graphs"),
        *make.runs("DiT", 8, "bf16", "graphs"),
        *make.latency("LatteT2V", (1,), "bf16", "graphs"),
        *make.runs("LatteT2V", 1, "bf16", "graphs"),
        *make.latency("Latte", (1,), "bf16", "eager"),
        *make.runs("Latte", 1, "bf16", "eager"),
        *make.latency("HunyuanDiT", (1,), "fp16", "eager"),
        *make.runs("HunyuanDiT", 1, "bf16", "eager"),
        *make.baseline("DiT", (8,), "bf16", "compiled"),
        *make.baseline("LatteT2V", (1,), "bf16", "eager"),
        *make.baseline("HunyuanDiT", (1,), "bf16", "eager"),
        *make.training(Stage("scratch")),
        *make.training(Stage("scratch", compile=True)),
        *make.training(Stage("stage 1", freeze=True, checkpointing=True)),
        *make.largest(Stage("scratch")),
        *(precision.row(make.cases[kind], 1) for kind in ("DiT", "LatteT2V")),
    ]
    return [replace(row, seconds=3, tracing=0, compiling=0) for row in rows]


def _full_rows(make: "_Rows") -> list[Row]:
    """Rows of the full-size models."""
    return [
        # the aims: DiT in bfloat16
        *make.latency("DiT", (64, 8, 1), "bf16", "eager"),
        *make.latency("DiT", (64,), "bf16", "compiled"),
        *make.latency("DiT", (8,), "bf16", "graphs"),
        *make.runs("DiT", 8, "bf16", "graphs"),
        *make.latency("DiT", (1,), "bf16", "graphs"),
        *make.baseline("DiT", (64, 8, 1), "bf16", "eager"),
        *make.training(Stage("scratch")),
        *make.runs("DiT", 8, "bf16", "eager"),
        # the other models
        *make.latency("HunyuanDiT", (1,), "bf16", "eager"),
        *make.latency("LatteT2V", (1,), "bf16", "eager"),
        *make.latency("Latte", (8, 1), "bf16", "eager"),
        *make.baseline("HunyuanDiT", (1,), "bf16", "eager"),
        *make.baseline("LatteT2V", (1,), "bf16", "eager"),
        *make.training(Stage("stage 1", freeze=True)),
        *make.training(Stage("stage 2")),
        *(precision.row(case, STEPS[kind] + 2) for kind, case in make.cases.items()),
        *make.training(Stage("scratch", compile=True)),
        *make.latency("HunyuanDiT", (1,), "bf16", "graphs"),
        *make.runs("HunyuanDiT", 1, "bf16", "graphs"),
        *make.latency("Latte", (1,), "bf16", "graphs"),
        *make.runs("Latte", 1, "bf16", "graphs"),
        *make.latency("LatteT2V", (1,), "bf16", "graphs"),
        *make.runs("LatteT2V", 1, "bf16", "graphs"),
        *make.largest(Stage("scratch")),
        # what remains in bfloat16
        *make.latency("HunyuanDiT", (4,), "bf16", "eager"),
        *make.training(Stage("scratch", checkpointing=True)),
        *make.latency("Latte", (8,), "bf16", "compiled"),
        *make.latency("HunyuanDiT", (4,), "bf16", "compiled"),
        *make.runs("Latte", 1, "bf16", "eager"),
        *make.runs("HunyuanDiT", 1, "bf16", "eager"),
        *make.runs("LatteT2V", 1, "bf16", "eager"),
        *make.training(Stage("stage 1", freeze=True, compile=True)),
        *make.training(Stage("stage 2", compile=True)),
        *make.training(Stage("scratch", compile=True, checkpointing=True)),
        *make.largest(Stage("scratch", checkpointing=True)),
        *make.largest(Stage("stage 1", freeze=True)),
        *make.latency("DiT", (8, 1), "bf16", "compiled"),
        *make.latency("DiT", (64,), "bf16", "graphs"),
        *make.rest("bf16", ("compiled", "graphs")),
        *make.baseline("DiT", (64, 8, 1), "bf16", "compiled"),
        *make.baseline("HunyuanDiT", (4,), "bf16", "eager"),
        *make.baseline("HunyuanDiT", (1,), "bf16", "compiled"),
        *make.baseline("LatteT2V", (1,), "bf16", "compiled"),
        # float16
        *make.rest("fp16", ("eager",)),
        *make.rest("fp16", ("compiled", "graphs")),
    ]


class _Rows:
    """Makes rows of the models of a size."""

    def __init__(self, cases: dict[str, Case]):
        self.cases = cases

    def latency(self, kind: str, batches: tuple[int, ...], dtype: str, mode: str) -> list[Row]:
        expected = {"seconds": STEPS[kind], "tracing": TRACING[kind], "compiling": COMPILING[kind]}
        return [latency.latency_row(self.cases[kind], batch, dtype, mode, **expected) for batch in batches]

    def rest(self, dtype: str, modes: tuple[str, ...]) -> list[Row]:
        """Latency of every model and batch; what came before falls away."""
        return [
            row
            for kind, case in self.cases.items()
            for mode in modes
            for row in self.latency(kind, case.batches, dtype, mode)
        ]

    def baseline(self, kind: str, batches: tuple[int, ...], dtype: str, mode: str) -> list[Row]:
        expected = {"seconds": STEPS[kind], "tracing": 0, "compiling": 2 * (TRACING[kind] + COMPILING[kind])}
        return [latency.baseline_row(self.cases[kind], batch, dtype, mode, **expected) for batch in batches]

    def runs(self, kind: str, batch: int, dtype: str, mode: str) -> list[Row]:
        expected = {"seconds": RUNS[kind], "tracing": TRACING[kind], "compiling": COMPILING[kind]}
        return [end_to_end.row(self.cases[kind], batch, dtype, mode, **expected)]

    def training(self, stage: Stage) -> list[Row]:
        return [training.row(self.cases["DiT"], stage, seconds=12, tracing=12, compiling=80)]

    def largest(self, stage: Stage) -> list[Row]:
        return [training.largest_row(self.cases["DiT"], stage, seconds=25)]
