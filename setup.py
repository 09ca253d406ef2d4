"""Packaging of OpenXComposer. Bounds admit what was tested and stop before the next release that may break it."""

from setuptools import find_packages, setup

setup(
    name="open-xcomposer",
    version="0.1.0",
    description="Open pretraining pipeline for InternLM-XComposer2: WebDataset in, DeepSpeed ZeRO training, SLURM",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["data_pipeline*", "train*", "slurm*", "compose*"]),
    package_data={"train.report": ["*.html"], "data_pipeline.inspect": ["*.html"], "slurm": ["*.j2"], "compose": ["*.html"]},
    install_requires=[
        "deepspeed>=0.19,<0.20",
        "duckdb>=1.4,<2",
        "jinja2>=3.1,<4",
        "lancedb>=0.40,<0.41",  # collections of pictures, searched on disk
        "ninja>=1.11",  # DeepSpeed compiles its CPU communication kernel on first use
        "numpy>=1.26,<3",
        "obstore>=0.12,<0.13",  # http(s)://, s3:// and gs:// shards
        "omegaconf>=2.4,<2.5",
        "pillow>=11,<14",
        "pyarrow>=18,<30",
        "rich>=13,<16",
        "safetensors>=0.5,<1",
        "simplejpeg>=1.9,<2",
        "tensorboard>=2.18,<3",
        "timm>=1.0.20,<1.1",
        "tokenizers>=0.21,<1",
        "torch>=2.10,<2.15",
        "torchvision>=0.25,<0.30",  # each release pins its torch; timm needs it
        "wandb>=0.20,<1",
        "webdataset>=1.0,<2",
        "wordllama>=0.4,<0.5",  # sentence embeddings whose weights lie in the package
        "xxhash>=3.5,<5",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8,<3"],
        "dev": [
            "hypothesis>=6.100,<7",
            "import-linter>=2.1,<3",
            "lxml>=5,<7",  # examples read documentation pages
            "psutil>=5.9,<8",
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "ruff>=0.12,<1",
            "transformers>=4.57,<6",  # the reference that the model is compared with
        ],
    },
    entry_points={
        "console_scripts": [
            "xc-compose=compose.cli:main",
            "xc-data=data_pipeline.cli:main",
            "xc-train=train.cli:main",
            "xc-slurm=slurm.cli:main",
        ]
    },
)
