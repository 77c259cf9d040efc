"""What the doctor makes of what its probes find: verdicts, fixes, and machines that are not at hand."""

from __future__ import annotations

import json
import re

import pytest

from nemo_kto.doctor import limits, machine, output, packages
from nemo_kto.doctor.findings import Finding, as_json, as_text, exit_code

GIB = 2**30
CUDA = {"version": "2.9.0", "cuda": "13.0", "nccl": "2.27.7", "gloo": True, "cpu_capability": "AVX512", "threads": 8}
GPU = {
    **{"index": 0, "name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "bf16": True},
    **{"memory_bytes": 80 * GIB, "free_bytes": 79 * GIB},
}


def _finding(*blocks: bool) -> Finding:
    finding = Finding("limits", "limits", {"open_files": 64}, ["open files: 64"])
    for number, block in enumerate(blocks):
        finding.wrong(f"what {number}", f"why {number}", f"fix {number}", blocks=block)
    return finding


def _said(finding: Finding) -> str:
    return "\n".join(f"{'BLOCKS ' * problem.blocks}{problem.what} | {problem.fix}" for problem in finding.problems)


# --- verdicts


def test_a_sound_machine():
    assert exit_code([_finding()]) == 0
    assert as_text([_finding()], "1.0") == (
        "nemo_kto 1.0\n\nlimits\n  open files: 64\n\nverdict: nothing stands in the way of training"
    )


def test_warnings_do_not_block():
    text = as_text([_finding(False)], "1.0")
    assert exit_code([_finding(False)]) == 0
    assert text.endswith(
        "verdict: nothing stands in the way of training; 1 warning\n  warning: what 0\n    why: why 0\n    fix: fix 0"
    )


def test_what_blocks_comes_first():
    text = as_text([_finding(False, True), _finding(True)], "1.0")
    assert exit_code([_finding(False, True)]) == 2
    assert "verdict: 2 problems must be mended before a training can run; 1 warning\n  PROBLEM: what 1" in text
    assert text.index("PROBLEM: what 0") < text.index("warning: what 0")


def test_the_json():
    report = as_json([_finding(False, True)], "1.0")
    assert json.loads(json.dumps(report)) == report
    assert (report["ok"], report["exit_code"], report["schema"]) == (False, 2, 1)
    assert report["probes"] == {"limits": {"open_files": 64}}
    assert [problem["what"] for problem in report["problems"]] == ["what 1", "what 0"]
    assert set(report["problems"][0]) == {"probe", "what", "why", "fix", "blocks"}


# --- devices


def test_a_gpu_node():
    finding = machine.devices(CUDA, {"devices": [GPU, {**GPU, "index": 1}], "why_none": ""})
    assert finding.problems == []
    assert "torch 2.9.0: CUDA 13.0, NCCL 2.27.7" in finding.lines
    assert finding.lines[-1] == "GPU 1: NVIDIA H100 80GB HBM3, 80.0 GiB, 79.0 free, compute capability 9.0"


@pytest.mark.parametrize(
    ("torch", "found", "said"),
    [
        (CUDA, {"devices": [{**GPU, "free_bytes": 20 * GIB}]}, "GPU 0 has 20.0 of 80.0 GiB free"),
        (CUDA, {"devices": [{**GPU, "bf16": False}]}, "GPU 0 (NVIDIA H100 80GB HBM3) has no bf16"),
        ({**CUDA, "nccl": None}, {"devices": [GPU]}, "BLOCKS torch sees GPUs and was built without NCCL"),
        (
            CUDA,
            {"devices": [], "why_none": "RuntimeError: Found no NVIDIA driver"},
            "torch is built for CUDA 13.0 and sees no device (RuntimeError: Found no NVIDIA driver)",
        ),
        ({"error": "ImportError: libcudart"}, {"error": "x"}, "BLOCKS torch cannot list devices (ImportError: libcu"),
    ],
)
def test_devices_that_are_wrong(torch, found, said):
    assert said in _said(machine.devices(torch, {"why_none": "", **found}))


def test_a_gpu_that_torch_cannot_see(tmp_path, monkeypatch):
    """As where pip has replaced the image's torch by a CPU build."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "nvidia0")
    said = _said(machine.devices({**CUDA, "cuda": None}, {"devices": [], "why_none": ""}))
    assert said.startswith("BLOCKS there is a GPU")
    assert "this torch is built without CUDA" in said


def test_a_broken_megatron_blocks():
    finding = machine.acceleration({"error": "ImportError: no"}, {"error": "ImportError: no"})
    assert [problem.blocks for problem in finding.problems] == [True, True]


# --- packages


@pytest.fixture
def imported(monkeypatch):
    """Packages as installed and as imported; by default as here."""

    def look(installed: dict[str, str | None], results: dict[str, dict[str, object]]) -> Finding:
        default = {package.module: {"version": "1"} for package in packages.PACKAGES if package.required}
        missing = {
            package.module: {"error": f"ModuleNotFoundError: No module named '{package.module.split('.')[0]}'"}
            for package in packages.PACKAGES
            if not package.required
        }
        monkeypatch.setattr(packages, "_import", lambda *_: (default | missing | results, {}))
        monkeypatch.setattr(packages, "installed_version", lambda name: installed.get(name))
        return packages.probe()[0]

    return look


def test_accelerators_are_not_needed(imported):
    finding = imported({}, {})
    assert finding.problems == []
    for name in ("Transformer Engine", "Apex", "flash-attn"):
        assert f"{name}: not installed, and not needed" in finding.lines


def test_pypis_apex_is_told_from_nvidias(imported):
    wrong = {"apex.optimizers": {"error": "ModuleNotFoundError: No module named 'apex.optimizers'"}}
    finding = imported({"apex": "0.9.10"}, wrong)
    assert "apex 0.9.10: not NVIDIA's Apex (no apex.optimizers), and of no use here" in finding.lines
    assert "the package apex 0.9.10 is not NVIDIA's Apex" in _said(finding)
    assert "pip uninstall apex" in _said(finding)


def test_an_apex_without_its_kernels(imported):
    finding = imported({"apex": "0.1"}, {"apex.optimizers": {"version": None}})
    assert "Apex was built without its CUDA kernels" in _said(finding)
    assert finding.facts["Apex"]["imports"]


def test_a_whole_apex_without_metadata(imported):
    finding = imported({}, {"apex.optimizers": {"version": None}, "amp_C": {"version": None}})
    assert finding.problems == []
    assert "Apex (no version)" in finding.lines


def test_a_broken_package_is_a_line_and_a_problem(imported):
    error = "ImportError: libtransformer_engine.so: undefined symbol: _ZN3c10"
    finding = imported(
        {"transformer_engine": "2.9"},
        {"transformer_engine.pytorch": {"error": error}, "torch": {"error": "its process was ended by SIGSEGV"}},
    )
    assert f"Transformer Engine 2.9: import fails: {error}" in finding.lines
    said = _said(finding)
    assert "BLOCKS torch cannot be imported (its process was ended by SIGSEGV)" in said
    assert f"Transformer Engine cannot be imported ({error})" in said
    assert "BLOCKS Transformer" not in said


def test_a_version_out_of_bounds(imported):
    said = _said(imported({"megatron-core": "0.9.0"}, {}))
    assert re.search(r"megatron-core 0\.9\.0 is outside <0\.17,>=0\.16\.\d", said), said


# --- limits


@pytest.mark.parametrize(("ranks", "files"), [(1, 4096), (8, 4096), (1024, 9216)])
def test_open_files_grow_with_the_job(ranks, files):
    assert limits.needed_files(ranks) == files


@pytest.mark.parametrize(
    ("soft", "hard", "said"),
    [
        (1024, 524288, "a process may hold 1024 files open, and 9216 are advisable here | ulimit -n 9216"),
        (1024, 4096, "| the hard limit is 4096: raise it"),
        (64, 524288, "BLOCKS a process may hold 64"),
        (9216, 9216, ""),
        (-1, -1, ""),
    ],
)
def test_open_files(monkeypatch, soft, hard, said):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (soft, hard))
    finding = Finding("limits", "limits")
    limits._files(finding, limits.needed_files(1024))
    assert said in _said(finding)
    assert bool(finding.problems) is bool(said)


def test_shared_memory(tmp_path, monkeypatch):
    assert limits.probe(shared_memory=tmp_path).facts["shared_memory"]["total_bytes"] > 0
    said = _said(limits.probe(shared_memory=tmp_path / "none"))
    assert "BLOCKS " in said
    assert "--shm-size" in said
    monkeypatch.setattr(limits, "SMALL_SHARED_MEMORY", 2**60)
    said = _said(limits.probe(shared_memory=tmp_path))
    assert "MiB | docker run --shm-size=8g" in said
    assert "BLOCKS" not in said


# --- the output directory


def test_a_directory_is_left_as_it_was(tmp_path):
    finding = output.probe(tmp_path / "new" / "run", asked=True)
    assert finding.facts["writable"]
    assert finding.facts["locks"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    output.probe(tmp_path / "there", asked=True)
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("asked", [True, False])
def test_a_directory_under_a_file(tmp_path, asked):
    (tmp_path / "file").touch()
    finding = output.probe(tmp_path / "file" / "run", asked=asked)
    assert not finding.facts["writable"]
    assert "exp_manager.explicit_log_dir" in finding.problems[0].fix
    assert finding.problems[0].blocks is asked


def test_an_archive_in_the_containers_own_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_filesystem", lambda _: "overlay")
    assert "inside the container's own file system" in _said(output.probe(tmp_path, asked=True))


def test_a_disk_that_is_nearly_full(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_SMALL", 2**62)
    assert "a full checkpoint takes" in output.probe(tmp_path, asked=True).problems[0].why
