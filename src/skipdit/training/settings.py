"""Settings of a training."""

from dataclasses import dataclass, field

from skipdit.config import ConfigError, Settings, setting

CHOICES = {
    "objective": ("diffusion", "flow"),
    "flow_times": ("logit-normal", "uniform"),
    "decay": ("linear", "cosine"),
}


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of `fit`."""

    steps: int = setting(400_000, "optimizer steps", identity=False, least=0)
    batch_size: int = setting(256, "samples per optimizer step, over all processes", least=1)
    micro_batch_size: int | None = setting(
        None, "samples per forward pass and process; fewer accumulate gradients", identity=False, least=1
    )
    objective: str = setting("diffusion", "diffusion, as released: noise (text-to-image: v); or flow: flow matching")
    flow_times: str = setting("logit-normal", "distribution of flow matching's times: logit-normal or uniform")
    flow_shift: float = setting(1.0, "of flow matching's times: above 1 more noise; samplers use it too", least=0.01)
    min_snr: float = setting(0.0, "of diffusion: weight in x0's error at most, usually 5; 0: that of noise", least=0)
    optimizer: str = setting("adamw", "adamw, or muon: Muon for the matrices of blocks and skips, AdamW for the rest")
    lr: float = setting(1e-4, "learning rate", least=0)
    muon_lr: float | None = setting(None, "Muon's learning rate; as lr by default", least=0)
    warmup: int = setting(0, "steps of linear warm-up", least=0)
    decay: str = setting("linear", "course of the learning rate's decay: linear or cosine")
    decay_steps: int = setting(0, "steps of decay to zero at the end", least=0)
    weight_decay: float = setting(0.0, "weight decay", least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW betas")
    grad_clip: float = setting(0.0, "largest gradient norm; 0 leaves gradients alone", least=0)
    ema_decay: float = setting(0.9999, "decay of the averaged weights", least=0, most=1)
    average_every: int = setting(
        0, "steps between what `skipdit weights average` makes an average of any length from; 0: none", least=0
    )
    freeze: bool = setting(False, "stage 1: train the long skips only")
    align: float = setting(
        0.0, "weight of alignment to an image encoder's features (REPA), 0.5 in the paper; 0: none", least=0
    )
    align_block: int | None = setting(
        None, "align the tokens after this many blocks; by default half of them with skips, else two sevenths", least=1
    )
    spectral: str = setting("none", "bound the skips' largest singular values: none, penalty or cap")
    spectral_weight: float = setting(0.01, "of the penalty, half the sum of their squares", least=0)
    spectral_cap: float = setting(1.0, "the largest one that a cap leaves", least=0)
    precision: str = setting("bf16", "fp32 or bf16: automatic mixed precision; weights stay float32")
    tf32: bool = setting(True, "let float32 products run in TF32 on the GPU, as the released code does")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass to save memory", identity=False
    )
    compile: bool = setting(False, "compile the model with torch.compile", identity=False)
    parallel: str = setting(
        "ddp", "ddp, or fsdp to shard weights, gradients and optimizer over the processes", identity=False
    )
    seed: int = setting(0, "seed of everything", least=0)
    workers: int = setting(4, "data loading processes per training process", identity=False, least=0)
    log_every: int = setting(
        50, "steps between lines of stats.jsonl and tensorboard; 0: the last only", identity=False, least=0
    )
    tracker: str | None = setting(None, "also log to wandb or trackio", identity=False)
    save_every: int = setting(5_000, "steps between checkpoints; 0: the last only", identity=False, least=0)
    keep: int = setting(3, "checkpoints to keep; 0 for all", identity=False, least=0)
    sample_every: int = setting(10_000, "steps between sample grids; 0 for none", identity=False, least=0)
    max_bad_steps: int = setting(
        10, "abort after this many steps in a row with a non-finite loss", identity=False, least=1
    )

    def __post_init__(self):
        super().__post_init__()
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name} is {value!r}; known: {', '.join(known)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {list(self.betas)}; both must be at least 0 and below 1")
        if self.min_snr and self.objective == "flow":
            raise ConfigError(f"min_snr is {self.min_snr:g}, and objective=flow has no such weights: set min_snr=0")
        if self.align and self.freeze:
            raise ConfigError(
                f"align is {self.align:g}, and freeze=true trains the skips alone, which lie behind the aligned block: "
                "set align=0"
            )

    @property
    def preview(self) -> str:
        """Name of the sampling method of sample grids."""
        return "euler" if self.objective == "flow" else "ddim"


@dataclass(frozen=True)
class JudgeConfig(Settings):
    """Settings of the Fréchet distance that is measured during a training; see `metrics.progress`."""

    every: int = setting(0, "steps between Fréchet distances of samples; 0: none", identity=False, least=0)
    reference: str | None = setting(
        None, "real images: a folder, or an .npz of images or of the statistics of FID", identity=False
    )
    samples: int = setting(1000, "images to sample", identity=False, least=2)
    sampling_steps: int = setting(50, "of each image, without guidance", identity=False, least=1)
    network: str | None = setting(
        None, "TorchScript file that gives features, in place of the network of FID", identity=False
    )


@dataclass(frozen=True)
class TrainerConfig(Settings):
    """What the settings of all tasks' trainers have; a task adds its model, its data and its condition."""

    out: str = setting("results", "run folder", identity=False)
    init: str | None = setting(
        None, "checkpoint to start from; one without skips may start a model with them (stage 1)", identity=False
    )
    vae: str = setting("stabilityai/sd-vae-ft-ema", "autoencoder, folder or Hub name", identity=False)
    vae_fingerprint: str | None = setting(None, "of the autoencoder; the trainer fills it in and refuses another")
    grid_guidance: float = setting(1.0, "guidance scale of the sample grids", identity=False, least=0)
    train: TrainConfig = field(default_factory=TrainConfig)
