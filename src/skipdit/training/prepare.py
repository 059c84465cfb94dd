"""How a training run begins: its command line; all files are there, the model is made, its weights are loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL

from skipdit.checkpoints.files import saved
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.records import sampling_command
from skipdit.cli import friendly_errors
from skipdit.config import changed
from skipdit.data.texts import LiveTexts, Texts, TextTable
from skipdit.encoders.autoencoder import load_vae
from skipdit.encoders.reading import LATTE, Reading
from skipdit.encoders.text import load_text_encoder
from skipdit.layers.skip import SkipTransformer
from skipdit.sampling.job import preflight
from skipdit.training.arguments import read_arguments
from skipdit.training.settings import TrainerConfig
from skipdit.utils.device import process_state
from skipdit.utils.dtypes import resolve_dtype
from skipdit.utils.provenance import fingerprint

T = TypeVar("T", bound=TrainerConfig)


def run_trainer(schema: type[T], description: str, train: Callable[[T, bool], Any]) -> None:
    """The command line of a task's train.py.

    Args:
        schema: the task's settings.
        description: for `--help`.
        train: `train(config, dry_run)` runs a config.
    """
    config, dry_run = read_arguments(schema, description)
    with friendly_errors():
        train(config, dry_run)
        if not dry_run:
            tell_next_step(config)


def tell_next_step(config: TrainerConfig) -> None:
    """Print where the checkpoint of a training is, and the command that samples from it."""
    files = saved(Path(config.out, "checkpoints"))
    if not files or not process_state().is_main_process:
        return
    task = type(config).__module__.split(".")[1].replace("_", "-")
    print(f"the trained model is in {files[-1]}; to sample from it:\n  {sampling_command(task, config.out)}")


def open_training(
    config: T,
    files: dict[str, str],
    build: Callable[[AutoencoderKL], SkipTransformer],
    fetch: str,
    absent: Sequence[str] = (),
) -> tuple[T, SkipTransformer, AutoencoderKL]:
    """Check that all files are there, then make the model of a training run and load its autoencoder.

    A run that goes on has its own weights and needs no `init`.

    Args:
        files: setting name -> path of the data, and whatever else has to be there.
        build: makes the model, for latents of this autoencoder.
        fetch: the command that fetches the released weights.
        absent: files that are known to be missing besides.

    Returns:
        The config with the autoencoder's fingerprint, which is kept with the run, so that it goes on with no other; the
        model; and the autoencoder.

    Raises FileNotFoundError that lists every missing file, before anything is loaded; WeightsError.
    """
    process_state()  # the main process decides for all, as it does which checkpoint they go on from
    (begun,) = broadcast_object_list([bool(saved(Path(config.out, "checkpoints")))])
    needed = {"vae": config.vae} | ({"init": config.init} if config.init and not begun else {}) | files
    preflight(needed, fetch, absent)
    vae = load_vae(config.vae)
    torch.manual_seed(config.train.seed)
    model = build(vae)
    if "init" in needed:
        new = load_weights(model, config.init, allow_missing="skips.*")
        if new and process_state().is_main_process:
            print(f"{len(new)} skip parameters are not in {config.init} and start anew: {new[0]} to {new[-1]}")
    model.flow_shift = config.train.flow_shift if config.train.objective == "flow" else None
    return changed(config, {"vae_fingerprint": fingerprint(vae)}), model, vae


def open_texts(
    captions: list[str],
    files: str | None,
    encoder: str | None,
    tokenizer: str | None,
    dtype: str,
    reading: Reading = LATTE,
) -> Texts:
    """The captions' embeddings: from `files`, if there are some, or by an encoder on this process's device.

    Args:
        files: see `TextTable`.
        encoder, tokenizer: see `load_text_encoder`.
        dtype: of the encoder, see `resolve_dtype`.
    """
    if files:
        return TextTable(files, captions, reading)
    device = process_state().device
    return LiveTexts(load_text_encoder(encoder, tokenizer, resolve_dtype(dtype, device), reading).to(device), captions)
