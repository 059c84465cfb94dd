"""The page's widgets: `skipdit app`."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skipdit.app.jobs import CHOICES, MOST, Request, Studio, field_settings
from skipdit.app.view import STYLE, comparison_html, error_html
from skipdit.cli import friendly_errors
from skipdit.config import load_config
from skipdit.sampling.class_conditional import SAMPLERS
from skipdit.sampling.settings import SCHEDULERS
from skipdit.tasks import find_task
from skipdit.utils.errors import UserError

if TYPE_CHECKING:  # not everybody has it
    import gradio

INTRODUCTION = """# skipdit
The same noise, sampled without a cache and with up to three: full steps run every block of the transformer, cached
steps the outer ones, forecast steps none. The interval and the plan follow the budget."""
HINT = '<p class="what">Compare shows the uncached sample here, and that of every cache beside it.</p>'


def form(file: str, task_name: str | None, overrides: list[str]) -> dict[str, Any]:
    """Return what the fields show of a config: the arguments of `Request`, `methods` and `classes`, None of prompts."""
    task = find_task(file, task_name)
    config = load_config(task.schema, file, overrides)
    prompts = "prompts" in {field.name for field in fields(task.schema)}
    window, steps = replace(task.window, interval=3), config.steps
    share = sum(window.full_mask([999 - 1000 * i // steps for i in range(steps)])) / steps
    classes = None if prompts else getattr(config.model, "num_classes", None)
    subject = (config.prompts or [""])[0] if prompts else (config.classes or [0])[0] if classes else None
    shown = {
        "config": file,
        "subject": subject,
        "steps": steps,
        "method": config.scheduler if prompts else config.sampler,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "budget": math.ceil(20 * share) / 20,
    }
    own = field_settings(task.schema, Request(**shown))
    fields_of_the_page = {*own, "prompts", "prompt_file", "cache"}
    shown["overrides"] = [text for text in overrides if text.partition("=")[0] not in fields_of_the_page]
    return shown | {"prompts": prompts, "methods": list(SCHEDULERS if prompts else SAMPLERS), "classes": classes}


def values_of(shown: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by the names of the fields of `form`, what the widgets of a config have of their own."""
    prompts, classes = shown["prompts"], shown["classes"]
    return {
        "prompt": {"value": shown["subject"] if prompts else "", "visible": prompts},
        "class": {
            "value": None if prompts else shown["subject"],
            "label": f"Class, 0 to {(classes or 1) - 1}",
            "visible": classes is not None,
        },
        "steps": {"value": shown["steps"]},
        "seed": {"value": shown["seed"]},
        "method": {"value": shown["method"], "choices": shown["methods"]},
        "guidance": {"value": shown["guidance_scale"]},
        "budget": {"value": round(100 * shown["budget"])},
        "more": {"value": "\n".join(shown["overrides"])},
    }


def build(studio: Studio, files: list[str], task: str | None = None, overrides: list[str] = ()) -> gradio.Blocks:
    """Return the page.

    Args:
        files: configs to choose from, the first one chosen.
        task: of all of them; None: that of their folders.
        overrides: of the first one.
    """
    import gradio as gr

    def values(file: str) -> dict[str, dict[str, Any]]:
        return values_of(form(file, task, list(overrides) if file == files[0] else []))

    def run(file, prompt, class_id, steps, seed, method, guidance, budget, more, caches, progress=gr.Progress(True)):  # noqa: B008
        subject = prompt if values(file)["prompt"]["visible"] else class_id
        lines = [line.strip() for line in (more or "").splitlines() if line.strip()]
        try:
            request = Request(file, subject, steps, method, guidance, seed, caches, budget / 100, lines, task)
            return comparison_html(studio.run(request))
        except (UserError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:  # what the user can mend
            return error_html(str(error))

    names = [(f"{Path(file).resolve().parent.name} / {Path(file).stem}", file) for file in files]
    first = values(files[0])
    with gr.Blocks(title="skipdit") as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown(names, value=files[0], label="Task and model", elem_id="model")
                prompt = gr.Textbox(label="Prompt", elem_id="prompt", **first["prompt"])
                class_id = gr.Number(precision=0, elem_id="class", **first["class"])
                with gr.Row():
                    steps = gr.Number(label="Steps", precision=0, min_width=90, elem_id="steps", **first["steps"])
                    seed = gr.Number(label="Seed", precision=0, min_width=90, **first["seed"])
                with gr.Row():
                    method = gr.Dropdown(label="Solver", min_width=90, **first["method"])
                    guidance = gr.Number(label="Guidance scale", min_width=90, **first["guidance"])
                caches = gr.Dropdown(
                    list(CHOICES),
                    value=list(CHOICES[:MOST]),
                    multiselect=True,
                    max_choices=MOST,
                    allow_custom_value=True,
                    label=f"Caches, up to {MOST}",
                    info="or a spec such as N3-1000-20-o1, or the FILE.json of a plan",
                    elem_id="caches",
                )
                budget = gr.Slider(5, 100, step=5, label="Budget: % of full steps", **first["budget"])
                with gr.Accordion("Other settings", open=bool(overrides)):
                    placeholder = "key=value, one per line"
                    more = gr.Textbox(
                        lines=3, label=placeholder, show_label=False, placeholder=placeholder, **first["more"]
                    )
                button = gr.Button("Compare", variant="primary")
            with gr.Column(scale=3, min_width=320):
                shown = gr.HTML(HINT, elem_id="results", min_height=300)
        widgets = [prompt, class_id, steps, seed, method, guidance, budget, more]
        model.input(
            lambda file: [gr.update(**one) for one in values(file).values()], model, widgets, show_progress="hidden"
        )
        gr.on(
            [button.click, prompt.submit],
            run,
            [model, *widgets, caches],
            shown,
            concurrency_limit=1,
            api_name="compare",
        )
    return page


def launch(page: gradio.Blocks, host: str, port: int | None, **more: Any) -> tuple:
    """Serve a page; `more` as of `gradio.Blocks.launch`. Nothing is asked of other hosts: no fonts, no statistics."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(server_name=host, server_port=port, theme=theme, css=STYLE, footer_links=[], **more)


@friendly_errors("opens the page again")
def main(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    launch(build(Studio(), args.config, args.task, args.overrides), args.host, args.port)
