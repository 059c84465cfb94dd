"""Pipelines of diffusers, tiny and of random weights: what a cache is tried in.

`build(name)` returns a pipeline and the arguments of a call. Texts are random embeddings, and there is neither a text
encoder nor, where the pipeline gets by without one, an autoencoder: calls return latents.
"""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn

Arguments = dict[str, Any]
Builder = Callable[[], tuple[nn.Module | dict[str, Any], Arguments]]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WIDTH = 16  # of texts
SQUARE = {"height": 32, "width": 32}  # pixels; latents are an eighth of that
BUILDERS: dict[str, Builder] = {}


def build(name: str) -> tuple[DiffusionPipeline, Arguments]:
    """Return the pipeline of a name, which is that of its class and maybe of a variant, and the arguments of a call."""
    torch.manual_seed(0)
    parts, arguments = BUILDERS[name]()
    parts = parts if isinstance(parts, dict) else {"transformer": parts}
    kind = getattr(diffusers, name.split()[0])
    needed = [x.name for x in inspect.signature(kind).parameters.values() if x.default is x.empty]
    parts = dict.fromkeys(needed) | {"scheduler": FlowMatchEulerDiscreteScheduler()} | parts
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 5, "output_type": "latent"} | arguments


def builds(name: str) -> Callable[[Builder], Builder]:
    """Register a builder of a pipeline: it returns its transformer, or its parts, and the arguments of a call."""

    def register(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return register


def texts(*names: str, length: int = 4, mask: bool = False) -> Arguments:
    """Random embeddings for these arguments, and masks of them that hide nothing."""
    shape = {name: (1, WIDTH) if "pooled" in name else (1, length, WIDTH) for name in names}
    embeds = {name: torch.randn(size) for name, size in shape.items()}
    masks = {name.replace("embeds", "attention_mask"): torch.ones(1, length, dtype=torch.int64) for name in names}
    return embeds | (masks if mask else {})


def guided(**options: Any) -> Arguments:
    """Texts of a call with guidance."""
    return texts("prompt_embeds", "negative_prompt_embeds", **options)


def autoencoder(channels: int = 4) -> diffusers.AutoencoderKL:
    """An autoencoder of images, at an eighth of the size."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=channels,
        shift_factor=0.0,
        sample_size=32,
    )


@builds("FluxPipeline")
def flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )
    return transformer, texts("prompt_embeds", "pooled_prompt_embeds") | SQUARE


@builds("FluxImg2ImgPipeline")
def flux_from_image():
    transformer, arguments = flux()
    return {"transformer": transformer, "vae": autoencoder()}, arguments | from_image()


def from_image() -> Arguments:
    """An image to begin from, after half of ten steps."""
    return {"image": torch.rand(1, 3, 32, 32), "strength": 0.5, "num_inference_steps": 10}


@builds("FluxInpaintPipeline")
def flux_within_image():
    parts, arguments = flux_from_image()
    return parts, arguments | mask()


def mask() -> Arguments:
    """The part of an image to paint anew."""
    return {"mask_image": (torch.rand(1, 1, 32, 32) > 0.5).float()}


@builds("FluxControlNetPipeline")
def flux_controlled():
    transformer, arguments = flux()
    sizes = {"num_layers": 1, "num_single_layers": 1, **HEADS}
    controlnet = randomized(diffusers.FluxControlNetModel.from_transformer(transformer, **sizes))
    return {"transformer": transformer, "controlnet": controlnet, "vae": autoencoder()}, arguments | controlled()


def randomized(model: nn.Module) -> nn.Module:
    """A ControlNet whose residuals, which begin as zeros, change something."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def controlled() -> Arguments:
    """An image to follow."""
    return {"control_image": torch.rand(1, 3, 32, 32)}


@builds("FluxPipeline (true guidance)")
def flux_guided():
    transformer, arguments = flux()
    return transformer, arguments | texts("negative_prompt_embeds", "negative_pooled_prompt_embeds") | {
        "true_cfg_scale": 2.0
    }


@builds("StableDiffusion3Pipeline")
def sd3(channels: int = 4):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        in_channels=channels,
        out_channels=channels,
        num_layers=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        **HEADS,
    )
    return transformer, guided() | texts("pooled_prompt_embeds", "negative_pooled_prompt_embeds") | SQUARE


@builds("StableDiffusion3Img2ImgPipeline")
def sd3_from_image():
    transformer, arguments = sd3()
    return {"transformer": transformer, "vae": autoencoder()}, arguments | from_image()


@builds("StableDiffusion3InpaintPipeline")
def sd3_within_image():
    transformer, arguments = sd3(channels=16)
    return {"transformer": transformer, "vae": autoencoder(channels=16)}, arguments | from_image() | mask()


@builds("StableDiffusion3ControlNetPipeline")
def sd3_controlled():
    transformer, arguments = sd3()
    controlnet = diffusers.SD3ControlNetModel(
        sample_size=4,
        in_channels=4,
        num_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        **HEADS,
    )
    parts = {"transformer": transformer, "controlnet": randomized(controlnet), "vae": autoencoder()}
    return parts, arguments | controlled()


@builds("WanPipeline")
def wan():
    return wan_transformer(), guided() | SQUARE | {"num_frames": 5}


@builds("WanPipeline (2.2, two transformers)")
def wan_2_2():
    parts = {"transformer": wan_transformer(), "transformer_2": wan_transformer(), "boundary_ratio": 0.6}
    return parts, wan()[1]


def wan_transformer() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
        **HEADS,
    )


@builds("PixArtAlphaPipeline")
def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        num_layers=4,
        cross_attention_dim=32,
        sample_size=4,
        caption_channels=WIDTH,
        use_additional_conditions=False,
        **HEADS,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.DPMSolverMultistepScheduler()}
    return parts, guided(mask=True) | SQUARE | {"use_resolution_binning": False, "negative_prompt": None}


@builds("LattePipeline")
def latte():
    transformer = diffusers.LatteTransformer3DModel(
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=WIDTH,
        video_length=4,
        **HEADS,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.DDIMScheduler()}
    return parts, guided() | SQUARE | {"video_length": 4, "negative_prompt": None}


def unet(**options: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )


@builds("StableDiffusionPipeline")
def stable_diffusion():
    parts = {"unet": unet(), "scheduler": diffusers.DDIMScheduler(), "requires_safety_checker": False}
    return parts, guided() | SQUARE


@builds("StableDiffusionImg2ImgPipeline")
def stable_diffusion_from_image():
    parts, arguments = stable_diffusion()
    arguments = {name: x for name, x in arguments.items() if name not in SQUARE}
    return parts | {"vae": autoencoder()}, arguments | from_image()


@builds("StableDiffusionXLPipeline")
def sdxl():
    model = unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    parts = {"unet": model, "scheduler": diffusers.EulerDiscreteScheduler(), "vae": autoencoder()}
    return parts, guided() | texts("pooled_prompt_embeds", "negative_pooled_prompt_embeds") | SQUARE


@builds("LTXPipeline")
def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=4, caption_channels=WIDTH, **HEADS
    )
    return transformer, guided(mask=True) | {"height": 64, "width": 64, "num_frames": 9}


@builds("CogVideoXPipeline")
def cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=4,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=4,
        use_rotary_positional_embeddings=True,
        **HEADS,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.CogVideoXDDIMScheduler()}
    return parts, guided() | SQUARE | {"num_frames": 5}


@builds("DiTPipeline")
def dit():
    transformer = diffusers.DiTTransformer2DModel(out_channels=8, num_layers=4, sample_size=4, **HEADS)
    parts = {"transformer": transformer, "vae": autoencoder(), "scheduler": diffusers.DDIMScheduler(clip_sample=False)}
    return parts, {"class_labels": [3], "output_type": "np"}


@builds("QwenImagePipeline")
def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )
    masks = {f"{name}_mask": torch.ones(1, 4, dtype=torch.int64) for name in guided()}
    return transformer, guided() | masks | SQUARE


@builds("SanaPipeline")
def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=4,
        **HEADS,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.DPMSolverMultistepScheduler()}
    arguments = {"height": 64, "width": 64, "use_resolution_binning": False, "negative_prompt": None}
    return parts, guided(mask=True) | arguments


@builds("Lumina2Pipeline")
def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return transformer, guided(mask=True) | SQUARE


@builds("ZImagePipeline")
def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 32, 32],
    )
    return transformer, {name: [text[0]] for name, text in guided().items()} | SQUARE


@builds("HunyuanVideoPipeline")
def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 4, 8),
        **HEADS,
    )
    arguments = texts("prompt_embeds", mask=True) | texts("pooled_prompt_embeds")
    return transformer, arguments | SQUARE | {"num_frames": 5}


@builds("AuraFlowPipeline")
def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=64,
        **HEADS,
    )
    return transformer, guided(mask=True) | SQUARE


@builds("MochiPipeline")
def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        max_sequence_length=4,
        **HEADS,
    )
    return transformer, guided(mask=True) | SQUARE | {"num_frames": 7}


@builds("Flux2Pipeline")
def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **HEADS,
    )
    return transformer, texts("prompt_embeds") | SQUARE


@builds("ChromaPipeline")
def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )
    arguments = {name: x.bool() if "mask" in name else x for name, x in guided(mask=True).items()}
    return transformer, arguments | SQUARE


@builds("CogView4Pipeline")
def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=4,
        rope_axes_dim=(8, 8),
        **HEADS,
    )
    return transformer, guided() | SQUARE


@builds("AllegroPipeline")
def allegro():
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=4,
        cross_attention_dim=48,
        sample_height=4,
        sample_width=4,
        sample_frames=2,
        caption_channels=WIDTH,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.DDIMScheduler()}
    return parts, guided(mask=True) | SQUARE | {"num_frames": 8, "negative_prompt": None}


@builds("PixArtSigmaPipeline")
def pixart_sigma():
    return pixart()


@builds("SkyReelsV2Pipeline")
def skyreels():
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
        **HEADS,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.UniPCMultistepScheduler()}
    return parts, guided() | SQUARE | {"num_frames": 5}


@builds("FluxControlPipeline")
def flux_control():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=32,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )
    image = Image.new("RGB", (32, 32), "teal")  # which the pipeline brings to a call's size, other than a tensor
    arguments = texts("prompt_embeds", "pooled_prompt_embeds") | {"control_image": image}
    return {"transformer": transformer, "vae": autoencoder()}, arguments | SQUARE


@builds("StableDiffusionControlNetPipeline")
def stable_diffusion_controlled():
    parts, arguments = stable_diffusion()
    controlnet = randomized(diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_channels=3))
    return parts | {"controlnet": controlnet, "vae": autoencoder()}, arguments | {
        "image": Image.new("RGB", (32, 32), "teal")
    }
