"""The page's widgets: `python -m skipdit app`."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipdit.app.jobs import CHOICES, MOST, Request, Studio, field_settings
from skipdit.app.view import STYLE, comparison_html, error_html
from skipdit.cli import friendly_errors
from skipdit.config import load_config
from skipdit.sampling.class_conditional import SAMPLERS
from skipdit.sampling.settings import SCHEDULERS
from skipdit.tasks import find_task

if TYPE_CHECKING:  # not everybody has it
    import gradio

INTRODUCTION = """# skipdit
The same noise, sampled without a cache and with up to three: full steps run every block of the transformer, cached
steps the outer ones, forecast steps none. Interval and plan follow the budget."""


def form(file: str, task_name: str | None, overrides: list[str]) -> dict[str, Any]:
    """Return what the fields show of a config: the arguments of `Request`, `methods` and `classes`, None of prompts."""
    task = find_task(file, task_name)
    config = load_config(task.schema, file, overrides)
    prompts = "prompts" in {field.name for field in fields(task.schema)}
    window, steps = replace(task.window, interval=4), config.steps
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
    shown["overrides"] = [text for text in overrides if text.partition("=")[0] not in own]
    return shown | {"prompts": prompts, "methods": list(SCHEDULERS if prompts else SAMPLERS), "classes": classes}


def build(studio: Studio, files: list[str], task: str | None = None, overrides: list[str] = ()) -> gradio.Blocks:
    """Return the page.

    Args:
        files: configs to choose from, the first one chosen.
        task: of all of them; None: that of their folders.
        overrides: of the first one.
    """
    import gradio as gr

    def fill(file: str) -> list:
        """The fields of a config, as they are when it is chosen."""
        shown = form(file, task, list(overrides) if file == files[0] else [])
        ids = "Class" if shown["classes"] is None else f"Class, 0 to {shown['classes'] - 1}"
        return [
            gr.Textbox(value=shown["subject"] if shown["prompts"] else "", visible=shown["prompts"]),
            gr.Number(None if shown["prompts"] else shown["subject"], label=ids, visible=shown["classes"] is not None),
            shown["steps"],
            gr.Dropdown(choices=shown["methods"], value=shown["method"]),
            shown["guidance_scale"],
            shown["seed"],
            round(100 * shown["budget"]),
            "\n".join(shown["overrides"]),
        ]

    def run(file, prompt, class_id, steps, method, guidance, seed, caches, budget, more, progress=gr.Progress(True)):  # noqa: B008
        subject = prompt if form(file, task, [])["prompts"] else class_id
        lines = [line.strip() for line in (more or "").splitlines() if line.strip()]
        try:
            request = Request(file, subject, steps, method, guidance, seed, caches, budget / 100, lines, task)
            return comparison_html(studio.run(request))
        except (ValueError, OSError, ArithmeticError) as error:  # what the user can mend, as in `friendly_errors`
            return error_html(str(error))

    names = [(f"{Path(file).resolve().parent.name} / {Path(file).stem}", file) for file in files]
    with gr.Blocks(title="skipdit") as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown(names, value=files[0], label="Task and model")
                prompt = gr.Textbox(label="Prompt", elem_id="prompt")
                class_id = gr.Number(label="Class", precision=0, elem_id="class")
                with gr.Row():
                    steps = gr.Number(label="Steps", precision=0, min_width=90, elem_id="steps")
                    seed = gr.Number(label="Seed", precision=0, min_width=90)
                with gr.Row():
                    method = gr.Dropdown(label="Solver", min_width=90)
                    guidance = gr.Number(label="Guidance scale", min_width=90)
                caches = gr.Dropdown(
                    list(CHOICES),
                    value=list(CHOICES[:MOST]),
                    multiselect=True,
                    max_choices=MOST,
                    allow_custom_value=True,
                    label="Caches",
                    info="or a spec such as N3-1000-20-o1, or a plan's FILE.json",
                    elem_id="caches",
                )
                budget = gr.Slider(5, 100, step=5, label="Budget: full steps, % at most")
                with gr.Accordion("Other settings", open=False):
                    more = gr.Textbox(lines=3, show_label=False, container=False, placeholder="key=value, one per line")
                button = gr.Button("Compare", variant="primary")
            with gr.Column(scale=3, min_width=320):
                shown = gr.HTML(elem_id="results", min_height=300)
        widgets = [prompt, class_id, steps, method, guidance, seed, budget, more]
        page.load(fill, model, widgets, show_progress="hidden")
        model.input(fill, model, widgets, show_progress="hidden")
        inputs = [model, prompt, class_id, steps, method, guidance, seed, caches, budget, more]
        gr.on([button.click, prompt.submit], run, inputs, shown, concurrency_limit=1, api_name="compare")
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
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("the page needs gradio, which is not installed: pip install gradio") from error
    launch(build(Studio(), args.config, args.task, args.overrides), args.host, args.port)
