"""``mics-ds plan`` with several clusters: the comparison, its prices, and the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from mics_ds.cli import app

JOB = ["--model", "llama-7b", "--sequence", "512", "--checkpointing"]
CLUSTERS = ["--cluster", "p5.48xlarge", "--cluster", "gb200-nvl72"]


def plan(*arguments) -> int:
    """Exit code of ``mics-ds plan``."""
    return app.run(["plan", *JOB, *arguments])


def test_the_same_job_on_two_clusters(capsys):
    assert plan(*CLUSTERS, "--gpus", "16,144", "--price", "50,40", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["clusters"]
    assert (first["cluster"], first["gpus"], first["dollars_per_hour"]) == ("p5.48xlarge", 16, 100)
    assert (second["cluster"], second["gpus"], second["dollars_per_hour"]) == ("gb200-nvl72", 144, 36 * 40)
    for found in (first, second):
        assert found["sources"]["flops"]
        for row in found["rows"]:
            tokens = row["tokens_per_s_per_gpu"] * found["gpus"] * 3600
            assert row["tokens_per_dollar"] == pytest.approx(tokens / found["dollars_per_hour"])


def test_one_number_counts_for_all_clusters(capsys):
    assert plan(*CLUSTERS, "--gpus", "72", "--json") == 0
    found = json.loads(capsys.readouterr().out)["clusters"]
    assert [item["gpus"] for item in found] == [72, 72]
    assert [item["rows"][0]["tokens_per_dollar"] for item in found] == [None, None]


def test_without_a_number_a_fast_domain_is_planned(capsys):
    assert plan(*CLUSTERS, "--json") == 0
    assert [item["gpus"] for item in json.loads(capsys.readouterr().out)["clusters"]] == [8, 72]


def test_the_table_has_one_line_for_each_cluster(capsys):
    assert plan(*CLUSTERS, "--price", "50,40") == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("cluster ")]
    assert [line.split()[0] for line in lines[head + 1 :]] == ["p5.48xlarge", "gb200-nvl72"]
    for column in ("GPUs", "tokens/s", "x ZeRO-3", "$/hour", "M tokens/$", "limited by"):
        assert column in lines[head]
    assert not any(line.startswith("ZeRO-3") for line in lines), "rows are for a single cluster"


def test_what_is_assumed_is_said(capsys):
    app.run(["plan", "--model", "llama-7b", "--cluster", "gb200-nvl72", "--gpus", "128"])
    printed = capsys.readouterr().out
    assert "sequences of 2048 tokens are assumed: give --sequence" in printed
    assert "128 GPUs, 4 on a node, 64 in a fast domain" in printed
    plan("--cluster", "p5.48xlarge")
    assert "assumed" not in capsys.readouterr().out


def test_host_memory_is_shown_by_part(capsys, tmp_path):
    path = tmp_path / "ds.json"
    section = {"stage": 3, "mics_checkpoint": {"async": True, "memory_every": 10}}
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": section}))
    assert plan("--cluster", "p5.48xlarge", "--gpus", "16", "--ds-config", str(path), "--json") == 0
    from_file = json.loads(capsys.readouterr().out)["rows"][1]["host_parts"]
    assert plan("--cluster", "p5.48xlarge", "--gpus", "16", "--async-save", "--memory-copies", "--json") == 0
    row = json.loads(capsys.readouterr().out)["rows"][1]
    assert row["host_parts"] == from_file
    assert row["host_bytes"] == from_file["copies"] + from_file["save"]
    assert all(from_file[part] for part in ("save", "copies", "load"))
    plan("--cluster", "p5.48xlarge", "--gpus", "16", "--memory-copies", "--parts")
    assert re.search(r"copies [\d.]+, load [\d.]+", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([*CLUSTERS, "--price", "1,2,3"], "--price takes one value, or one for each of 2 clusters"),
        ([*CLUSTERS, "--gpus", "8,8,8"], "--gpus takes one value, or one for each of 2 clusters"),
        ([*CLUSTERS, "--price", "0"], "takes positive numbers with commas, got '0'"),
        ([*CLUSTERS, "--price", "nan"], "takes positive numbers with commas, got 'nan'"),
        ([*CLUSTERS, "--gpus", "8,x"], "takes positive numbers with commas, got '8,x'"),
        ([*CLUSTERS, "--page", "plan.pdf"], "A page is drawn as .html or .png, got 'plan.pdf'"),
        ([*CLUSTERS, "--page", "nowhere/plan.html"], "There is no folder nowhere for the page"),
        (["--cluster", "gb200-nvl72", "--gpus", "148"], "do not fill fast domains"),
    ],
)
def test_good_errors(arguments, match, capsys):
    assert plan(*arguments) == 2
    assert match in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------ the page


class References(HTMLParser):
    """Collects what a browser would fetch, and the text of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.fetched += [values[name] for name in ("src", "href", "xlink:href", "data") if name in values]
        self._in_cell = tag == "td"

    def handle_data(self, data):
        if self._in_cell:
            self.cells.append(data.strip())


def test_the_page_is_one_file_that_needs_nothing_else(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    cluster = tmp_path / "cluster.json"
    cluster.write_text(json.dumps({"preset": "p5.48xlarge", "name": "<i>ours</i> & $their_s$"}))
    page = tmp_path / "plan.html"
    assert plan(*CLUSTERS, "--cluster", str(cluster), "--price", "50,40,30", "--page", str(page)) == 0
    text = page.read_text()
    found = References()
    found.feed(text)
    assert [target for target in found.fetched if not target.startswith("#")] == []
    assert "url(http" not in text
    assert "<i>ours" not in text
    assert any(cell.startswith("<i>ours</i> & $their_s$, 8 GPUs: MiCS") for cell in found.cells)
    for words in ("million tokens/$", "72 GPUs: MiCS", "NVIDIA H100 data sheet, dense", "</svg>"):
        assert words in text
    assert f"drew {page}" in " ".join(capsys.readouterr().err.split("\n"))


def test_the_page_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "plan.png"
    assert plan("--cluster", "p5.48xlarge", "--page", str(page)) == 0
    assert page.read_bytes().startswith(b"\x89PNG")
