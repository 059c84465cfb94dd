"""Models that were trained here, in diffusers' own classes and pipelines."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    LattePipeline,
    LatteTransformer3DModel,
)
from diffusers.models.cache_utils import CacheMixin

from skipdit import load_weights
from skipdit.checkpoints.convert import convert
from skipdit.class_to_image import DiT
from skipdit.config import load_config
from skipdit.encoders.autoencoder import downsampling
from skipdit.text_to_image import sample_t2i
from skipdit.text_to_image.model import rotary_tables
from skipdit.text_to_video import sample_t2v

ROOT = Path(__file__).parents[1]
NULL = 1000  # the class id that DiTPipeline takes for none
SIZES = {"input_size": 8, "patch_size": 1, "hidden_size": 96, "depth": 28, "num_heads": 3, "num_classes": 10}
BLOCK = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj"}  # diffusers' names, ours
BLOCK |= {"ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
CLIPS = {  # of as many tokens each: LattePipeline takes one length, and padding would change the clips
    "prompts": ["police car", "red heart", "snowman", "racing car"],
    "planned": ["fire engine", "alarm clock"],
}
IMAGES = {
    "prompts": ["red apple", "octopus", "pizza", "sailboat"],
    "planned": ["rabbit face", "cactus"],
}


@dataclass(frozen=True)
class TrainedModel:
    """A pipeline, what it is called with, and what diffusers' caches have to know of its transformer.

    Attributes:
        call: arguments of the call that is measured.
        planned: those of the calls that a plan is fitted on.
        blocks: a pattern of the names of its blocks.
        parts: names of what a block adds to the hidden states.
        last: name of the layer that ends it.
        attention: the kinds of attention in its blocks, as PyramidAttentionBroadcast calls them.
    """

    pipe: DiffusionPipeline
    call: dict[str, Any]
    planned: dict[str, Any]
    blocks: str
    parts: tuple[str, ...]
    last: str
    attention: tuple[str, ...]


class DiTTransformer(DiTTransformer2DModel, CacheMixin):
    """diffusers' DiT, with the methods of its caches, which it has not by itself."""


class HunyuanDiTTransformer(HunyuanDiT2DModel, CacheMixin):
    """diffusers' Hunyuan-DiT, likewise."""


def to_diffusers(model: DiT) -> DiTTransformer:
    """Return a plain model in diffusers' class, in evaluation mode."""
    state, config = model.state_dict(), model.config
    theirs = DiTTransformer(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=2 * config.in_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NULL,
        norm_eps=1e-6,
    )
    known = state["y_embedder.embedding_table.weight"]
    table = torch.zeros(NULL + 1, config.hidden_size)
    table[: len(known) - 1], table[NULL] = known[:-1], known[-1]
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_2": "final_layer.linear"}
    names["proj_out_1"] = "final_layer.adaLN_modulation.1"
    new = {}
    for i, block in enumerate(theirs.transformer_blocks):
        own = f"transformer_blocks.{i}."
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the original code has it
        names |= {own + a: f"blocks.{i}.{b}" for a, b in BLOCK.items()}
        names |= {f"{own}norm1.emb.timestep_embedder.linear_{j}": f"t_embedder.mlp.{2 * j - 2}" for j in (1, 2)}
        new[f"{own}norm1.emb.class_embedder.embedding_table.weight"] = table
        for part in ("weight", "bias"):
            for letter, chunk in zip("qkv", state[f"blocks.{i}.attn.qkv.{part}"].chunk(3), strict=True):
                new[f"{own}attn1.to_{letter}.{part}"] = chunk
    new |= {f"{a}.{part}": state[f"{b}.{part}"] for a, b in names.items() for part in ("weight", "bias")}
    theirs.load_state_dict(new)
    theirs.pos_embed.pos_embed = model.pos_embed.detach().clone()
    return theirs.eval()


def class_to_image(config: str | None, samples: int) -> TrainedModel:
    """The plain twin of the embedded model of 28 blocks."""
    model = DiT(**SIZES, skip=False)
    load_weights(model, ROOT / "benchmarks/weights/class-to-image-plain.pt")
    vae = AutoencoderKL.from_pretrained(ROOT / "class-to-image/weights/vae").eval()
    call = {"class_labels": [i % SIZES["num_classes"] for i in range(samples)], "guidance_scale": 2.0}
    pipe = DiTPipeline(to_diffusers(model), vae, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    return TrainedModel(pipe, call, call, r"transformer_blocks\.\d+", ("attn1", "ff"), "proj_out_2", ("spatial",))


def text_to_video(config: str | None, samples: int) -> TrainedModel:
    """The plain model of clips from prompts."""
    settings = ["skip=false", "weights=benchmarks/weights/text-to-video-plain.pt"]
    config = load_config(sample_t2v.Config, config or "configs/text-to-video/demo.yaml", settings)
    parts = sample_t2v.check(config, None)
    parts.load(config.weights)
    theirs = LatteTransformer3DModel.from_config(parts.model.config)  # theirs, but for what is about skips
    theirs.load_state_dict(parts.model.state_dict())
    encoder = sample_t2v.open_text_encoder(config, torch.float32)

    def call(prompts: list[str]) -> dict[str, Any]:
        encoded = sample_t2v.encode_prompts(encoder, prompts, config.negative_prompt).values()
        prompt_embeds, negative_prompt_embeds = (torch.cat(each) for each in zip(*encoded, strict=True))
        embeddings = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        return embeddings | {
            "negative_prompt": None,
            "guidance_scale": config.guidance_scale,
            "video_length": config.num_frames,
            "height": parts.size[0],
            "width": parts.size[1],
        }

    return TrainedModel(
        LattePipeline(None, None, parts.vae, theirs.eval(), parts.make_scheduler(config.scheduler)),
        call(CLIPS["prompts"][:samples]),
        call(CLIPS["planned"]),
        blocks=r"(temporal_)?transformer_blocks\.\d+",
        parts=("attn1", "attn2", "ff"),
        last="proj_out",
        attention=("spatial", "temporal", "cross"),
    )


def text_to_image(config: str | None, samples: int) -> TrainedModel:
    """A model with skips as released: diffusers' class knows no others, and none without."""
    config = load_config(sample_t2i.Config, config or "configs/text-to-image/demo.yaml")
    parts = sample_t2i.check(config, None)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, "transformer")
        convert(Path(config.places()["weights"]), converted, HunyuanDiT2DModel, torch.float32)
        theirs = HunyuanDiTTransformer.from_pretrained(converted).eval()
    factor = downsampling(parts.vae) * theirs.config.patch_size
    rotary = rotary_tables(*(side // factor for side in parts.size), theirs.config.attention_head_dim)
    theirs.register_forward_pre_hook(  # the pipeline's tables are for autoencoders of a factor of 8
        lambda _, args, kwargs: (args, kwargs | {"image_rotary_emb": rotary}), with_kwargs=True
    )

    def call(prompts: list[str]) -> dict[str, Any]:
        text, negative, _ = sample_t2i.encode_prompts(config, theirs, prompts)
        negative = negative.rows([0] * len(prompts), torch.device("cpu"), torch.float32)
        texts = {"": text.clip, "_2": text.t5}, {"": negative.clip, "_2": negative.t5}
        arguments = {"guidance_scale": config.guidance_scale, "height": parts.size[0], "width": parts.size[1]}
        for prefix, encoders in zip(("", "negative_"), texts, strict=True):
            for suffix, encoded in encoders.items():
                arguments[f"{prefix}prompt_embeds{suffix}"] = encoded.embeddings
                arguments[f"{prefix}prompt_attention_mask{suffix}"] = encoded.mask
        return arguments | {"use_resolution_binning": False}

    return TrainedModel(
        sample_t2i.make_pipeline(parts.vae, theirs, parts.make_scheduler(config.scheduler)),
        call(IMAGES["prompts"][:samples]),
        call(IMAGES["planned"]),
        blocks=r"blocks\.\d+",
        parts=("attn1", "attn2", "ff"),
        last="proj_out",
        attention=("spatial", "cross"),
    )


MODELS: dict[str, Callable[[str | None, int], TrainedModel]] = {
    "class-to-image": class_to_image,
    "text-to-video": text_to_video,
    "text-to-image": text_to_image,
}
