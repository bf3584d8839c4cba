"""Start a job of four p4d nodes on SageMaker (SDK version 2). Needs AWS credentials and a role; nothing runs on import.

The folder given as source_dir holds train.py, its JSON and a requirements.txt that names mics_ds.
"""

from __future__ import annotations

import argparse


def estimator(role: str) -> object:
    """Return an estimator whose nodes start torchrun with a rank per GPU."""
    from sagemaker.pytorch import PyTorch

    return PyTorch(
        entry_point="train.py",
        source_dir="job",
        role=role,
        instance_type="ml.p4d.24xlarge",
        instance_count=4,
        framework_version="2.8",
        py_version="py312",
        distribution={"torch_distributed": {"enabled": True}},
        environment={"FI_EFA_USE_HUGE_PAGE": "0"},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", required=True, help="ARN of the execution role")
    estimator(parser.parse_args().role).fit()
