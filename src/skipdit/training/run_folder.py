"""The folder of a training: one run, one process group at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from skipdit.config import flatten, free_settings, to_yaml
from skipdit.utils.errors import UserError
from skipdit.utils.files import naming, replace_text
from skipdit.utils.lock import hold


@contextmanager
def _alone(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make a run folder and hold it. What the main process cannot do there, all processes refuse."""
    with ExitStack() as held:
        refusal = None
        if accelerator.is_main_process:
            try:
                with naming(out):
                    out.mkdir(parents=True, exist_ok=True)
                held.enter_context(hold(out))
            except (OSError, ValueError) as error:
                refusal = error
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


def claim_folder(out: Path, run_config: Any, accelerator: Accelerator) -> None:
    """Write config.yaml into a new run folder, or check that the one there is the same run."""
    path, text = out / "config.yaml", to_yaml(run_config)
    if path.exists():
        configs = OmegaConf.structured(type(run_config)), OmegaConf.load(path), OmegaConf.create(text)
        defaults, before, now = (flatten(OmegaConf.to_container(config)) for config in configs)
        before = defaults | before  # which may lack newer settings
        free = free_settings(type(run_config))
        if now.get("train.decay_steps"):  # which counts back from the end
            free.discard("train.steps")
        differ = [k for k in before | now if before.get(k) != now.get(k) and k not in free]
        if differ:
            raise UserError(
                f"{out} holds a run with other settings; give this one another folder (out=...):\n"
                + "\n".join(f"  {key}: {before.get(key)} there, {now.get(key)} now" for key in differ)
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    accelerator.wait_for_everyone()
