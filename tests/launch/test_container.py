"""The Dockerfile, really built by buildah on stand-ins for its base images, and the tiny demo in what comes out.

NVIDIA's images are too large for a test, so a stand-in has their shape: torch in the system's Python, a virtual
environment over it that has no pip of its own and holds Megatron, an older one than the index has, and PIP_CONSTRAINT
set to something else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_kit import Buildah, mounted_by, python_base

import nemo_kto

pytestmark = [pytest.mark.launch, pytest.mark.timeout(5400)]

ROOT = Path(__file__).resolve().parent.parent.parent
TORCH = re.findall(r"^torch==(\S+)$", (ROOT / "requirements/cpu.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]
PYTHON_BASE, NVIDIA_LIKE = "localhost/base:python", "localhost/base:nvidia-like"
GPU, CPU = "localhost/nemo_kto:gpu", "localhost/nemo_kto:cpu"
MEGATRON = "0.16.0"
SET_UP = f"""
set -e
python3 -m pip install --quiet torch=={TORCH}+cpu numpy==2.3.5 setuptools || {{
  python3 -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch=={TORCH}
  python3 -m pip install --quiet numpy==2.3.5 setuptools
}}
python3 -m venv --without-pip --system-site-packages /opt/venv
/opt/venv/bin/python3 -m pip install --quiet --no-deps megatron-core=={MEGATRON}
mkdir /etc/pip && echo numpy==1.26.4 >/etc/pip/constraint.txt
"""
SYSTEM, VENV = "/usr/local/lib/python3.11/dist-packages", "/opt/venv/lib/python3.11/site-packages"
OWNERS = f"""
import importlib.metadata, json, pathlib
found = {{}}
for name, folder in (("torch", "{SYSTEM}/torch"), ("numpy", "{SYSTEM}/numpy"), ("megatron-core", "{VENV}/megatron")):
    package = importlib.metadata.distribution(name)
    times = sum(file.stat().st_mtime_ns for file in pathlib.Path(folder).rglob("*.py"))
    found[name] = [package.version, str(package.locate_file("")), times]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def buildah(tmp_path_factory) -> Iterator[Buildah]:
    missing = [name for name in ("buildah", "mmdebstrap") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.fail(f"needs root, and the packages of tests/launch/packages.txt; not found: {', '.join(missing)}")
    made = Buildah(tmp_path_factory.mktemp("buildah"))
    yield made
    made.close()
    assert not made.root.exists()
    assert mounted_by(made.root) == []


@pytest.fixture(scope="module")
def plain(buildah) -> str:
    python_base(buildah, PYTHON_BASE)
    return PYTHON_BASE


@pytest.fixture(scope="module")
def nvidia_like(buildah, plain) -> str:
    with buildah.container(plain) as box:
        buildah.run(box, "sh", "-c", SET_UP, network=True, timeout=1800)
        path = "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        buildah("config", f"--env=PATH={path}", "--env=PIP_CONSTRAINT=/etc/pip/constraint.txt", box)
        buildah("commit", "--quiet", box, NVIDIA_LIKE)
    return NVIDIA_LIKE


@pytest.fixture(scope="module")
def gpu(buildah, nvidia_like) -> str:
    build = {"BASE_IMAGE": nvidia_like, "REVISION": "0bb3d3d", "SOURCE": "https://example.com/nemo_kto"}
    buildah.build("gpu", GPU, **build)
    return GPU


@pytest.fixture(scope="module")
def cpu(buildah, plain) -> str:
    buildah.build("cpu", CPU, CPU_BASE_IMAGE=plain, REVISION="0bb3d3d", SOURCE="https://example.com/nemo_kto")
    return CPU


@pytest.fixture(params=["gpu", "cpu"])
def image(request) -> str:
    return request.getfixturevalue(request.param)


def _held(buildah: Buildah, image: str) -> dict[str, list]:
    """Version and place of what must stay, and a sum over their files' times, which a reinstall would change."""
    with buildah.container(image) as box:
        return dict(json.loads(buildah.run(box, "python3", "-c", OWNERS).stdout))


def test_what_the_base_has_stays(buildah, nvidia_like, gpu):
    before = _held(buildah, nvidia_like)
    assert before["megatron-core"][:2] == [MEGATRON, VENV]
    assert before["torch"][:2] == [f"{TORCH}+cpu", SYSTEM]
    assert _held(buildah, gpu) == before


def test_the_cpu_image_has_the_pinned_set(buildah, cpu):
    with buildah.container(cpu) as box:
        listed = buildah.run(box, "python3", "-m", "pip", "list", "--format=freeze").stdout
    pins = _pins((ROOT / "requirements/cpu.txt").read_text(encoding="utf-8"))
    has = {name: version.removesuffix("+cpu") for name, version in _pins(listed).items()}
    assert len(pins) > 100
    assert {name: version for name, version in pins.items() if has.pop(name, None) != version} == {}
    assert set(has) - {"pip", "wheel"} == {"nemo-kto"}, "not pinned: what cpu.txt asks for by way of others"


def _pins(text: str) -> dict[str, str]:
    """Names as pip compares them, and versions."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


@pytest.mark.parametrize(("image", "user"), [("gpu", "1000:1000"), ("cpu", "54321:0")], indirect=["image"])
def test_the_demo_runs_as_anybody(buildah, image, user, row):
    line = row(f"{image.rpartition('/')[2]} image, by buildah, make demo's path as {user}", 1)
    with buildah.container(image) as box:
        said = buildah.run(
            box, "python3", "/opt/nemo_kto/examples/demo/run.py", "tiny", user=user, timeout=1800
        ).stdout
        with buildah.files(box) as root:
            out = root / "workspace/demo_out/tiny"
            scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
            steps = (out / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
            owner = f"{(out / 'model').stat().st_uid}:{(out / 'model').stat().st_gid}"
    assert owner == user
    assert sum('"loss"' in line for line in steps) == 20, said[-3000:]
    assert scores["num_desirable"] + scores["num_undesirable"] == 64
    assert scores["auc"] > 0.9, scores
    assert scores["margin"] > 5 * scores["margin_se"], scores
    line.result = f"AUC {scores['auc']:.2f}"


def test_a_user_without_a_name_has_a_home_and_caches(buildah, image):
    script = (
        "import getpass, os, pathlib, site, torch._inductor.runtime.cache_dir_utils as dirs;"
        "places = [pathlib.Path.home() / '.cache/nemo_kto', pathlib.Path(dirs.cache_dir()), pathlib.Path.cwd() / 'x'];"
        "[place.mkdir(parents=True, exist_ok=True) or (place / 'file').write_text('') for place in places];"
        "print(os.getuid(), getpass.getuser(), site.ENABLE_USER_SITE)"
    )
    with buildah.container(image) as box:
        assert buildah.run(box, "python3", "-c", script, user="54321:54321").stdout.split() == [
            "54321",
            "kto",
            "False",
        ]


def test_the_default_command_is_the_doctor(buildah, image):
    command = buildah.config(image)["Cmd"]
    assert command == ["nemo-kto", "doctor"]
    with buildah.container(image) as box:
        said = buildah.run(box, *command, user="1000:1000", timeout=900).stdout
    assert TORCH in said, said
    assert "Traceback" not in said, said


def test_torchrun_in_it(buildah, gpu, row):
    """As docs/launch.md has it for Docker, whose containers can resolve their own names."""
    line = row("gpu image, by buildah, torchrun --standalone", 2)
    torchrun = ("python3", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with buildah.container(gpu, "--add-host=box:127.0.0.1") as box:
        command = (*torchrun, "-m", "nemo_kto.cli.main", "doctor", "--collective")
        said = buildah.run(box, *command, user="1000:1000", host="box", timeout=600).stdout
    assert "world 2 = 1 node x 2 (torchrun)" in said, said
    assert re.search(r"^  2 ranks on 1 node\(s\) over gloo\n  all_reduce: \d", said, re.MULTILINE), said
    line.result = "exchanged data"


def test_labels(buildah, image):
    config = buildah.config(image)
    prefix = "org.opencontainers.image."
    labels = {key.removeprefix(prefix): value for key, value in config["Labels"].items() if key.startswith(prefix)}
    assert labels.pop("title").startswith("nemo_kto")
    assert labels.pop("base.name", NVIDIA_LIKE) == NVIDIA_LIKE
    assert labels == {
        **{"version": nemo_kto.__version__, "revision": "0bb3d3d"},
        **{"source": "https://example.com/nemo_kto", "licenses": "Apache-2.0"},
    }
    assert "Healthcheck" not in config


def test_no_layer_holds_what_is_not_for_the_image(buildah, image):
    layers = buildah.layers(image)
    assert len(layers) > 5
    ours = {name for layer in layers for name in layer if name.startswith("opt/nemo_kto/")}
    assert "opt/nemo_kto/examples/demo/run.py" in ours
    tops = {name.split("/")[2] for name in ours}
    known = {
        "LICENSE",
        "README.md",
        "conf",
        "docker",
        "examples",
        "held",
        "nemo_kto",
        "pyproject.toml",
        "requirements",
    }
    assert tops <= known, tops - known
    everything = {part for layer in layers for name in layer for part in name.split("/")}
    assert not everything & {".git", ".venv", "demo_out", "kto_results", ".pytest_cache"}
    assert not [name for name in ours if name.endswith(".pyc")]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        pytest.param(
            f"torch!={TORCH}", r"error: the image has torch \S+, and torch!=\S+ is needed: use another", id="itself"
        ),
        pytest.param("torchvision==0.20.1", r"ResolutionImpossible|conflicting dependencies", id="by_another_package"),
    ],
)
def test_a_package_that_would_replace_one_is_refused(buildah, nvidia_like, extra, message):
    """torchvision 0.20.1 needs torch 2.5.1."""
    said = buildah.build("gpu", "localhost/refused", check=False, BASE_IMAGE=nvidia_like, EXTRA_PACKAGES=extra)
    assert re.search(message, said), said[-3000:]
    assert "localhost/refused" not in buildah("images").stdout


def test_a_base_with_another_megatron_is_refused(buildah, nvidia_like):
    with buildah.container(nvidia_like) as box:
        install = ("/opt/venv/bin/python3", "-m", "pip", "install", "--quiet", "--no-deps", "megatron-core==0.15.3")
        buildah.run(box, "env", "PIP_CONSTRAINT=", *install, network=True)
        buildah("commit", "--quiet", box, "localhost/base:old")
    said = buildah.build("gpu", "localhost/refused", check=False, BASE_IMAGE="localhost/base:old")
    assert re.search(r"error: the image has megatron-core 0\.15\.3, and megatron-core<0\.17,>=\S+ is needed", said)
    assert "Collecting" not in said.split("STEP")[-1]


def test_a_megatron_that_pip_cannot_see_is_not_installed_over(buildah, gpu):
    """It may be on the path with no metadata."""
    with buildah.container(gpu) as box:
        script = "rm -r /opt/venv/lib/python3.11/site-packages/megatron_core-*; cd /opt/nemo_kto; python3 docker/"
        record = "held_packages.py record pyproject.toml held && cat held/requirements.txt"
        lines = buildah.run(box, "sh", "-c", script + record).stdout.splitlines()
    assert "safetensors>=0.4.5" in lines
    assert not [line for line in lines if line.startswith("megatron")]
