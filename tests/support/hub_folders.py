"""Hugging Face folders of tiny models, written by transformers itself, and the stage that fits them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from data_pipeline.config import DataConfig, ImageConfig
from train.config import Config, RunConfig
from train.model_config import DecoderConfig, ModelConfig, PLoRAConfig, ProjectorConfig, VisionConfig

VOCAB = 97
SIZE = 56
"""Of CLIP's images, 4 x 4 patches; the stage's own size is given where it differs."""


def stage_config(kv_heads: int = 2, size: int = SIZE, block: int = -1) -> Config:
    """The parts of a stage that say which model it is."""
    vision = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
    model = ModelConfig(
        vision=VisionConfig("vit_large_patch14_clip_quickgelu_336", 14, block, vision),
        projector=ProjectorConfig(),
        decoder=DecoderConfig(VOCAB, hidden=48, layers=2, heads=6, kv_heads=kv_heads, ffn=64, rope_theta=1e4, rms_eps=1e-5),
        plora=PLoRAConfig(rank=4, alpha=4.0, dropout=0.0),
    )
    return Config(run=RunConfig("test", "runs/test"), data=DataConfig(images=ImageConfig(size, (size // 14) ** 2)), model=model)


def llama(kv_heads: int = 2, tied: bool = False) -> LlamaForCausalLM:
    """The decoder of `stage_config` as a Llama, with weights large enough to matter in the sixth digit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def clip(size: int = SIZE) -> CLIPVisionModel:
    """The tower of `stage_config` as transformers' CLIP."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=size, patch_size=14
    )
    config._attn_implementation = "eager"
    model = CLIPVisionModel(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm.weight" in name or "norm1.weight" in name else 0.0, 0.2)
    return model


def dinov2() -> Dinov2Model:
    """The same as a DINOv2, whose layer scales matter."""
    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, patch_size=14, attn_implementation="eager"
    )
    model = Dinov2Model(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if name.endswith(("norm1.weight", "norm2.weight", "lambda1")) else 0.0, 0.2)
    return model


def saved(model: torch.nn.Module, folder: Path, shard_size: str = "5GB") -> str:
    """What transformers writes."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    return str(folder)


def as_bins(folder: Path) -> None:
    """Turns safetensors into the older layout: two .bin shards and their index."""
    tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of `model.safetensors`; `__` in a keyword stands for a dot."""
    file = folder / "model.safetensors"
    found = load_file(file)
    for keyword, tensor in tensors.items():
        name = keyword.replace("__", ".")
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    save_file(found, file, metadata={"format": "pt"})
