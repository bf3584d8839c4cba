"""What is not Python: shell scripts, the Dockerfile, cluster examples and the JSONs of ``configs/``."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import plan_table
import pytest
import yaml

from mics_ds.config import split_ds_config
from mics_ds.doctor.examination import examine
from mics_ds.doctor.job import describe, read_hostfile
from mics_ds.doctor.node import Node

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "examples" / "cluster"
SHELL = [
    *sorted(ROOT.glob("scripts/*.sh")),
    ROOT / ".ci" / "run",
    *sorted(CLUSTER.glob("*.sh")),
    *sorted(CLUSTER.glob("*.sbatch")),
]
HEALTHY = {"mics_ds": "1", "deepspeed": "0.19.8", "torch": "2.13.0"}


def tool(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed: pip install .[lint]")
    return str(path)


def test_shell_scripts_pass_shellcheck():
    done = subprocess.run([tool("shellcheck"), "-x", *map(str, SHELL)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run([tool("hadolint"), str(CLUSTER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset_replicas.yaml"])
def test_the_jobs_of_kubernetes_follow_their_schemas(name):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install .[lint]")
    *others, jobset = yaml.safe_load_all((CLUSTER / name).read_text())
    for other in others:
        validate.validate(other, "1.31", strict=True)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = jobset["spec"]["replicatedJobs"]
    # JobSet's own schema is not to be had; the Job inside it is what most of the file is.
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": group["template"]["spec"]}
    validate.validate(job, "1.31", strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    nodes = job["spec"]["completions"]
    assert (
        f"--nnodes {nodes} --nproc_per_node {container['resources']['limits']['nvidia.com/gpu']}"
        in container["command"][2]
    )
    assert f"{jobset['metadata']['name']}-{group['name']}-0-0.{jobset['metadata']['name']}" in container["command"][2]


def test_the_job_of_skypilot_has_known_keys():
    job = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert set(job) <= {"name", "num_nodes", "resources", "workdir", "setup", "run", "envs", "file_mounts"}
    script = "#!/usr/bin/env bash\nset -e\n" + job["run"]
    done = subprocess.run([tool("shellcheck"), "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_hostfile_and_its_json_have_no_finding(tmp_path):
    hosts = read_hostfile((CLUSTER / "hostfile").read_text())
    assert list(hosts.values()) == [8] * 4
    (tmp_path / "dev/shm").mkdir(parents=True)
    node = Node(environ={}, root=tmp_path, packages=HEALTHY, size_of=lambda path: 1 << 40)
    job, found = describe(node, ROOT / "examples/deepspeed/ds_config.json", CLUSTER / "hostfile")
    assert found + examine(node, job) == []
    assert (job.ranks, job.layout.replication_size) == (32, 16)


def test_the_job_of_sagemaker_names_arguments_of_its_sdk():
    tree = ast.parse((CLUSTER / "sagemaker_job.py").read_text())
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "PyTorch"]
    assert {item.arg for item in call.keywords} == {
        *("entry_point", "source_dir", "role", "instance_type", "instance_count", "framework_version", "py_version"),
        *("distribution", "environment"),
    }


@pytest.mark.parametrize("entry", plan_table.ENTRIES, ids=lambda entry: f"{entry.config}-{entry.nodes}")
def test_a_configuration_fits_and_is_as_fast_as_the_best(entry):
    _, mine, best = entry.planned()
    assert mine.fits
    assert best is not None
    assert mine.time.total <= 1.03 * best.time.total, f"the planner chooses p = {best.p}, {best.states}"


def test_every_configuration_is_in_the_table_and_accepted():
    names = {path.stem for path in (ROOT / "configs").glob("*.json")} - {Path(plan_table.ETHERNET).stem}
    assert names == {entry.config for entry in plan_table.ENTRIES}
    for name in names:
        mics, _ = split_ds_config(json.loads((ROOT / "configs" / f"{name}.json").read_text()))
        assert mics is not None


@pytest.mark.parametrize("page", plan_table.PAGES, ids=lambda page: page.parent.name)
def test_pages_show_what_the_planner_says(page):
    assert plan_table.shown(page) == plan_table.on(page, plan_table.table()), "run scripts/plan_table.py --write"
