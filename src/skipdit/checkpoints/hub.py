"""Models on the Hugging Face Hub: their folder, with a card that says what they are, and its upload."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import HfApi
from torch import nn

from skipdit.caching.plans import CachePlan
from skipdit.checkpoints.card import make_card, read_samples
from skipdit.checkpoints.records import SECTIONS, to_ship
from skipdit.checkpoints.single_file import open_model
from skipdit.checkpoints.sums import SUMS, sha256
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import fingerprint


class CardSettings(NamedTuple):
    """What goes beside a model, and into its card.

    Attributes:
        license: as the Hub calls it, such as apache-2.0.
        data: what the model was trained on; None: the name of the folder.
        plan: file of a cache plan.
        samples: output folder of a sampler, whose settings, overview and results of `skipdit evaluate` are shown.
    """

    license: str = "unknown"
    data: str | None = None
    plan: str | Path | None = None
    samples: str | Path | None = None


class OnHub:
    """What our model classes have besides diffusers' `from_pretrained` and `save_pretrained`."""

    @classmethod
    def from_single_file(
        cls, path: str | Path, torch_dtype: torch.dtype = torch.float32, skips: str | None = None, **settings: Any
    ) -> nn.Module:
        """Make a model of a weights file, in eval mode and on the CPU.

        Args:
            path: a file as released, of a training, or of `skipdit weights export`.
            skips: see `load_state`.
            settings: constructor arguments that neither the file nor its shapes tell, such as `num_heads`.

        Raises WeightsError, see `open_model`; FileNotFoundError.
        """
        return open_model(path, cls, torch_dtype, skips, **settings).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str = "unknown",
        data: str | None = None,
        plan: str | Path | None = None,
        samples: str | Path | None = None,
        **options: Any,
    ) -> str:
        """Upload the model with a card. Returns the address of the commit.

        Args:
            repo_id: owner/name on the Hub, which is made if there is none.
            license: see `CardSettings`.
            data: see `CardSettings`.
            plan: see `CardSettings`.
            samples: see `CardSettings`.
            options: see `upload`.
        """
        with TemporaryDirectory() as folder:
            write_folder(Path(folder), self, {}, repo_id, CardSettings(license, data, plan, samples))
            return upload(Path(folder), repo_id, **options)


def write_folder(folder: Path, model: nn.Module, record: Mapping[str, Any], repo: str, chosen: CardSettings) -> None:
    """Write a model, its checksums, the settings of its training and its card into a folder.

    Args:
        model: of diffusers' `ModelMixin`.
        record: what its weights say of themselves, see `known_entries`.
        repo: its name on the Hub, owner/name, for the card.

    Raises UserError or FileNotFoundError for a plan that is none, or samples without report.json.
    """
    samples = read_samples(Path(chosen.samples)) if chosen.samples else {}
    plan, picture, record = CachePlan.load(chosen.plan) if chosen.plan else None, None, to_ship(record)
    model.save_pretrained(folder)
    if plan:  # which may be of other weights
        plan.check(fingerprint(model), plan.about.get("sampler"), plan.about.get("guidance_scale"))
        shutil.copyfile(chosen.plan, folder / "plan.json")
    sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors")))
    (folder / SUMS).write_text(sums, encoding="utf-8")
    if record.get("args", {}).keys() >= SECTIONS:  # for samplers
        text = yaml.safe_dump(record["args"], sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    if samples.get("picture"):
        picture = "samples.png"
        shutil.copyfile(samples["picture"], folder / picture)
    card = make_card(model, record, repo, chosen.license, chosen.data, plan, samples, picture)
    card.save(folder / "README.md")


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> str:
    """Upload a folder to a repository of the Hub, which is made if there is none; a card that it has already stays.

    Returns:
        The address of the commit.

    Raises UserError if the Hub does not take it.
    """
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kept = ["README.md"] if api.file_exists(repo, "README.md") else None
        options = {"commit_message": commit_message, "create_pr": create_pr, "ignore_patterns": kept}
        commit = api.upload_folder(repo_id=repo, folder_path=folder, **options)
    except Exception as error:  # each major version of the client brings the exceptions of another HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repo_id} was not uploaded: {reason}; `hf auth login` lets the Hub know you") from error
    return str(commit.commit_url)
