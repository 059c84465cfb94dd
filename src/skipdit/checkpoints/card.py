"""Model cards: what a model on the Hub is, how it was trained, how to use it, and what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from skipdit.caching.plans import CachePlan
from skipdit.caching.policy import NAMES
from skipdit.checkpoints.records import look_up, sampling_command

TEMPLATE = Path(__file__).with_name("model_card.md")
_TASKS = {  # class -> task, and the nearest to it that the Hub knows
    "DiT": ("class-to-image", "unconditional-image-generation"),
    "Latte": ("class-to-video", "other"),
    "LatteT2V": ("text-to-video", "text-to-video"),
    "HunyuanDiT": ("text-to-image", "text-to-image"),
    "HunyuanDiT2DModel": ("text-to-image", "text-to-image"),
}
_TRAINING = ["data.kind", "data.image_size", "data.num_frames", "data.frame_interval", "train.batch_size", "train.lr"]
_TRAINING += ["train.objective", "train.optimizer", "train.ema_decay", "train.freeze"]
_TRAINING += ["vae", "text_encoder", "clip.encoder", "t5.encoder"]
_SAMPLING = ["sampler", "scheduler", "steps", "guidance_scale", "image_size", "height", "width", "num_frames", "cache"]


def read_samples(folder: Path) -> dict[str, Any]:
    """Return what a sampler's output folder says: `settings`, `figures` and the file of its overview, `picture`.

    Figures are rows of metric, value, and what the samples were compared with, as `skipdit evaluate` wrote them.

    Raises FileNotFoundError if there is no report.json.
    """
    if not (folder / "report.json").is_file():
        raise FileNotFoundError(f"no report.json in {folder}: name the output folder of `skipdit sample`")
    files = [folder / "report.json", *sorted(folder.glob("evaluation/*.json"))]
    report, *judged = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    settings = {key: report["config"].get(key) for key in _SAMPLING}
    if report.get("flops_speedup") not in (None, 1):
        settings["speedup in FLOPs"] = f"{report['flops_speedup']:.2f}"
    figures = [
        (metric, value, Path(record["protocol"].get("reference", {}).get("source", "prompts")).name)
        for record in judged
        for metric, value in record["results"].items()
        if isinstance(value, float)
    ]
    picture = next((file for name in ("grid.png", "sheet.png") if (file := folder / name).is_file()), None)
    return {"settings": settings, "figures": figures, "picture": picture}


def make_card(
    model: nn.Module,
    record: Mapping[str, Any],
    repo: str,
    license: str,
    data: str | None = None,
    plan: CachePlan | None = None,
    samples: Mapping[str, Any] | None = None,
    picture: str | None = None,
) -> ModelCard:
    """Return the card of a model.

    Args:
        model: of diffusers' `ModelMixin`.
        record: what its weights say of themselves, see `known_entries`.
        repo: its name on the Hub, owner/name.
        license: as the Hub calls it, such as apache-2.0.
        data: what it was trained on; None: the name of that folder.
        plan: lies beside it as plan.json.
        samples: what `read_samples` returns.
        picture: a file beside it that shows samples.
    """
    model_class, name, args = type(model).__name__, repo.rpartition("/")[2], record.get("args", {})
    ours, samples = hasattr(model, "config_from_state"), samples or {}
    task, tag = _TASKS.get(model_class, ("", "other"))
    training = {"data": data or look_up(args, "data.path"), "steps": record.get("step")}
    tables = {
        "Model": {key: value for key, value in dict(model.config).items() if not key.startswith("_")},
        "Training": training | {key: look_up(args, key) for key in _TRAINING},
        "Sampling": samples.get("settings", {}),
        "Evaluation": {f"{metric}, {other}": f"{value:.4g}" for metric, value, other in samples.get("figures", ())},
    }
    results = [
        EvalResult(task_type=tag, dataset_type=other, dataset_name=other, metric_type=metric, metric_value=value)
        for metric, value, other in samples.get("figures", ())
    ]
    card_data = ModelCardData(
        license=license,
        library_name="skipdit" if ours else "diffusers",
        pipeline_tag=tag,
        tags=["skip-dit", "diffusers", *([task] if task else [])],
        model_name=name if results else None,  # which they ask for
        eval_results=results or None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repo=repo,
        module="skipdit" if ours else "diffusers",
        model_class=model_class,
        summary=_summary(model, task),
        command=_command(name, task, tables["Sampling"], plan) if ours and args else None,
        plan=plan and _in_words(plan),
        picture=picture,
        tables={title: {k: _shown(v) for k, v in rows.items() if v is not None} for title, rows in tables.items()},
    )


def _shown(value: Any) -> str:
    """A setting in a table; of a place on the maker's machine its name alone."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _summary(model: nn.Module, task: str) -> str:
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f} million parameters"
    parts = [size, *([f"{model.n_skips} long skips"] if getattr(model, "n_skips", 0) else [])]
    return f"{type(model).__name__}{f' for {task}' if task else ''} with {' and '.join(parts)}, made with skipdit."


def _command(name: str, task: str, settings: Mapping[str, Any], plan: CachePlan | None) -> str:
    """How to sample from the folder `name`, as samples were made, or as the plan is for."""
    method = "scheduler" if task.startswith("text") else "sampler"
    keys = (method, "steps", "guidance_scale")
    about = plan.about | {method: plan.about.get("sampler"), "steps": len(plan.kinds)} if plan else settings
    words = [f"{key}={about[key]}" for key in keys if about.get(key) is not None]
    return sampling_command(task, name, *words, *([f"--cache {name}/plan.json"] if plan else []))


def _in_words(plan: CachePlan) -> str:
    """A plan's steps, and what it was made for."""
    counts = [f"{plan.kinds.count(kind)} {name}" for kind, name in NAMES.items() if kind in plan.kinds]
    told = {"sampler": "sampler", "guidance scale": "guidance_scale"}
    made_for = [f"{name} {plan.about[key]}" for name, key in told.items() if key in plan.about]
    steps = f"of {len(plan.kinds)} steps {', '.join(counts)}"
    return f"{steps}; made for {', '.join(made_for)}" if made_for else steps
