"""Representation alignment: a block's tokens are trained towards those of an image encoder (REPA, arXiv 2410.06940).

A projection maps the tokens after one block to the encoder's; minus the mean cosine similarity of both, times
`train.align`, joins the loss. The projection belongs to the training, not to the model: it is in the trainer's
checkpoints, and neither in the average nor in what is sampled or exported.

With long skips the block is by default the last before the middle: skips carry details of the noisy input past it, and
U-REPA (arXiv 2503.18414) finds the middle best. Without skips it is that after two sevenths, as the 8th of 28 in REPA.
"""

import math
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from skipdit.data.features import FeatureInfo
from skipdit.layers.inspect import layers_run_by
from skipdit.layers.skip import SkipTransformer, skip_stack
from skipdit.training.settings import TrainConfig
from skipdit.utils.errors import UserError
from skipdit.utils.seeding import seed_of

WIDTH = 2048  # of the projection, as in REPA


class Alignment:
    """The projection of a training, its optimizer, and the tokens of the model's last call under `watching`.

    The projection is small, so every process has all of it, sharded weights or not. Right under gradient accumulation
    and data parallelism, since `finish` acts once per step on what they leave.

    Args:
        model: its layers keep tokens (N, T, D) of a square of patches.
        features: of the dataset; None if it has none.

    Attributes:
        block: the tokens after this many blocks are aligned.

    Raises ValueError for a dataset without features, and a model of fewer blocks.
    """

    def __init__(self, model: SkipTransformer, features: FeatureInfo | None, config: TrainConfig):
        if features is None:
            raise UserError(
                "train.align needs images with features of an image encoder, which class-to-image alone reads: "
                "set train.align=0"
            )
        middle = model.depth // 2 if model.n_skips else round(model.depth * 2 / 7)
        self.block = config.align_block or max(1, middle)
        if self.block > model.depth:
            raise UserError(f"train.align_block is {self.block}; the model has {model.depth} blocks")
        with torch.random.fork_rng(devices=[]):  # in all processes alike
            torch.manual_seed(seed_of(config.seed, 0, 1))  # no step's
            widths = (model.config.hidden_size, WIDTH, WIDTH, features.dim)
            first, *others = (nn.Linear(*pair) for pair in pairwise(widths))
            self.projection = nn.Sequential(first, *(layer for linear in others for layer in (nn.SiLU(), linear)))
        self.optimizer = AdamW(
            self.projection.parameters(), lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay
        )
        self._encoder, self._tokens = features.fingerprint, None

    def watching(self, model: SkipTransformer) -> AbstractContextManager[None]:
        """Keep the tokens of a model's calls for a while."""
        return layers_run_by(model, self._run_layers)

    def _run_layers(self, x: Tensor, *, block, **others) -> Tensor:
        def watched(i: int, x: Tensor) -> Tensor:
            x = block(i, x)
            if i + 1 == self.block:
                self._tokens = x
            return x

        return skip_stack(x, block=watched, **others)

    def losses(self, features: Tensor) -> Tensor:
        """Losses (N,), -1 to 1, of the model's last call: features (N, rows, columns, D) of the images, mirrored where
        those were. If the model has another grid of tokens, they are interpolated to it.
        """
        tokens, self._tokens = self._tokens, None
        side = math.isqrt(tokens.shape[1])
        target = features.float().movedim(-1, 1)
        if target.shape[-2:] != (side, side):
            target = F.interpolate(target, (side, side), mode="bilinear", antialias=True)
        return -F.cosine_similarity(self.projection(tokens).float(), target.flatten(2).mT, dim=-1).mean(1)

    def finish(self, accelerator: Accelerator, limit: float) -> Tensor:
        """Average the projection's gradients over processes, once their micro-batches are summed, and clip them.
        Returns their norm before that.
        """
        for parameter in self.projection.parameters():
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
        return nn.utils.clip_grad_norm_(self.projection.parameters(), limit)

    def state_dict(self) -> dict:
        states = {"projection": self.projection.state_dict(), "opt": self.optimizer.state_dict()}
        return {"encoder": self._encoder} | states

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` gave. Raises ValueError if that was of another encoder."""
        if state["encoder"] != self._encoder:
            raise UserError(
                "the run began with features of another encoder than those in data.path now: encode the first ones "
                "again, or give the run another folder (out=...)"
            )
        self.projection.load_state_dict(state["projection"])
        self.optimizer.load_state_dict(state["opt"])
