"""Packaging of mics_ds. ``pip install .`` is enough to make the mics_ keys work in every DeepSpeed script."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "mics_ds" / "__init__.py").read_text()).group(1)

setup(
    name="mics-ds",
    version=VERSION,
    description="MiCS for DeepSpeed: ZeRO-3 sharded over a small partition group, from one JSON key",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["mics_ds*"]),
    package_data={"mics_ds": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.5", "deepspeed>=0.18.9", "packaging", "tqdm", "hjson", "psutil"],
    extras_require={
        "test": [
            "pytest>=8",
            "ruff>=0.17,<0.18",
            "hypothesis>=6.100",
            # the frameworks whose own code the tests run
            "transformers>=5.23,<5.24",
            "accelerate>=1.15,<1.16",
            "peft>=0.21,<0.22",
            "lightning>=2.6,<2.7",
        ],
        "plot": ["matplotlib>=3.8"],
        "run": [],
    },
    entry_points={
        "torch.backends": ["mics_ds = mics_ds:autoload"],
        "console_scripts": ["mics-plan = mics_ds.planner.cli:command"],
    },
)
