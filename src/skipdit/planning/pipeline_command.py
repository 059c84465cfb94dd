"""`skipdit plan --pipeline NAME`: a plan for a diffusers pipeline, from a command line."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import load_image
from PIL import Image

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.caching.policy import FULL
from skipdit.planning.pipeline_bench import PipelineBench
from skipdit.planning.tables import distance, psnr_of
from skipdit.sampling.prompts import read_prompts
from skipdit.utils.device import process_state
from skipdit.utils.dtypes import resolve_dtype
from skipdit.utils.errors import UserError

STEPS = 50  # unless the command line says another number


def open_bench(args: argparse.Namespace) -> PipelineBench:
    """Load the pipeline that a command line names, and read what it is called with.

    Raises ValueError for arguments that are no key=value, or none.
    """
    arguments = {"num_inference_steps": STEPS}
    for text in args.overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} has no '='; write arguments of the pipeline as key=value: guidance_scale=3.5")
        arguments[name] = _argument(name, value)
    steps, seed = arguments.pop("num_inference_steps"), arguments.pop("seed")
    for name, value in (("num_inference_steps", steps), ("seed", seed)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value!r}; it must be a whole number from 1 on")
    if arguments.get("output_type", "np") not in ("np", "pil"):
        raise UserError(f"output_type={arguments['output_type']}: the images of a plan are shown: leave it out")
    if args.prompts:
        arguments["prompt"] = read_prompts([], args.prompts)
    if not arguments:
        raise UserError("there is nothing to show: give --prompts FILE, or what the pipeline takes as key=value")
    pipe = open_pipeline(args)
    known = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in arguments if name not in known]:
        raise UserError(f"{type(pipe).__name__} takes no {unknown[0]}; it takes {', '.join(list(known)[1:])}")
    return PipelineBench(pipe, arguments, args.steps or steps, seed, args.target)


def _argument(name: str, text: str) -> Any:
    """An argument of a pipeline, of its text. Raises UserError for an image that is not there, and broken YAML."""
    if name in ("prompt", "negative_prompt") and not text.startswith("["):
        return text  # as it is: "a cat: in ink" is no table, and "no" no truth value
    try:
        return load_image(text) if name.endswith("image") else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{name}={text}: {str(error).splitlines()[0]}") from error


def open_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """Load the pipeline that a command line names, on its device. Raises UserError, naming it, if it cannot be."""
    device = process_state().device
    dtype = resolve_dtype(args.dtype, device)
    try:
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=dtype)
    except (OSError, ValueError) as error:  # ValueError: neither a folder nor a name that the Hub could have
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pipeline {args.pipeline}: neither a pipeline's folder nor on the Hub ({reason})") from error
    if args.scheduler:
        pipe.scheduler = scheduler_of(pipe, args.scheduler)
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_of(pipe: DiffusionPipeline, name: str) -> SchedulerMixin:
    """The scheduler of a class of diffusers, with the settings of the pipeline's. Raises UserError for a name that is
    none, or a class that does not understand these settings.
    """
    own = pipe.scheduler
    known = {kind.__name__: kind for kind in (type(own), *own.compatibles)}
    if name not in known:
        raise UserError(f"--scheduler {name}: the settings of {type(own).__name__} are for {', '.join(sorted(known))}")
    return known[name].from_config(own.config)


def held_out(bench: PipelineBench, plan: CachePlan, out: str) -> None:
    """Sample from other noise than the plan was fitted on: uncached, with the plan, and with as many full steps alone.
    Print how long the calls took and how far the images are from the uncached ones, and save them beside the plan, a
    column per sample; of clips, the frame in the middle.
    """
    full, bench.seed = plan.kinds.count(FULL), bench.seed + 1
    runs = {"uncached": (CacheSpec(), bench.steps), "plan": (plan, bench.steps), f"{full} steps": (CacheSpec(), full)}
    rows: list[np.ndarray] = []
    print(f"\n{'other noise, distance to uncached':40s}   error   PSNR   seconds")
    for name, (policy, steps) in runs.items():
        rows.append(bench.images(policy, steps))
        error = distance(rows[-1], rows[0])
        print(f"{name:40s}  {error:.4f}  {psnr_of(error):5.1f}  {bench.call_seconds:8.1f}")
    path = Path(out).with_suffix(".png")
    contact_sheet(rows).save(path)
    print(f"{path}: a row of images for each of these three")


def contact_sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """Images (N, H, W, 3), or clips (N, F, H, W, 3), of every row side by side."""
    stills = [row[:, row.shape[1] // 2] if row.ndim == 5 else row for row in rows]
    table = np.concatenate([np.concatenate(list(row), axis=1) for row in stills], axis=0)
    return Image.fromarray((table.clip(0, 1) * 255).round().astype(np.uint8))
