"""Images and containers by buildah, in a storage of their own that is gone afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUILD_S = 2400
"""For one build: it downloads and installs some 150 packages."""
STORAGE = '[storage]\ndriver = "{driver}"\ngraphroot = "{root}/graph"\nrunroot = "{root}/run"\n'


class Buildah:
    """The ``buildah`` command with storage, temporary files and caches under one folder.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True)
        overlay = "overlay" in Path("/proc/filesystems").read_text(encoding="utf-8")
        settings = STORAGE.format(driver="overlay" if overlay else "vfs", root=root / "storage")
        (root / "storage.conf").write_text(settings, encoding="utf-8")
        own = {"CONTAINERS_STORAGE_CONF": str(root / "storage.conf"), "TMPDIR": str(root / "tmp")}
        self._environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", **own}
        self._network = _pip_mounts(root)

    def __call__(self, *words: str, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command; stderr is in ``stdout``."""
        command = ["buildah", *words]
        with subprocess.Popen(
            command,
            **{"env": self._environment, "text": True, "start_new_session": True},
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        ) as process:
            try:
                said, _ = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # what runs in the container would outlive buildah
                raise
        done = subprocess.CompletedProcess(command, process.returncode, said)
        assert not check or done.returncode == 0, f"buildah {' '.join(words)}\n{done.stdout[-5000:]}"
        return done

    def build(self, target: str, tag: str, *, check: bool = True, **arguments: str) -> str:
        """Build a target of this repository's Dockerfile from its working tree; returns what was printed."""
        words = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        context = str(Path(__file__).resolve().parent.parent.parent)
        command = ("bud", "--layers", "--pull-never", f"--target={target}", f"--tag={tag}", *words, *self._network)
        return self(*command, context, timeout=BUILD_S, check=check).stdout

    @contextmanager
    def container(self, image: str, *options: str) -> Iterator[str]:
        """A container's name; it is removed afterwards. ``options`` are those of ``buildah from``."""
        name = self("from", "--quiet", "--pull-never", *options, image).stdout.split()[-1]
        try:
            yield name
        finally:
            self("rm", name)

    def run(
        self, container: str, *command: str, user: str = "0:0", network: bool = False, host: str = "", **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a container, as a user.

        Args:
            network: whether pip finds indexes and its cache, as in a build.
            host: the container's own name; otherwise one that nothing in the container can resolve.
        """
        cache = ("--mount=type=cache,target=/var/.cache/pip", "--env=PIP_CACHE_DIR=/var/.cache/pip")
        options = [*self._network, *cache] if network else []
        options += [f"--hostname={host}"] if host else []
        return self("run", f"--user={user}", *options, container, "--", *command, **more)

    def config(self, image: str) -> dict[str, Any]:
        """An image's configuration: Cmd, Env, Labels, User, WorkingDir."""
        text = self("inspect", "--type=image", image).stdout
        return dict(json.loads(text)["OCIv1"]["config"])

    @contextmanager
    def files(self, container: str) -> Iterator[Path]:
        """A container's root directory."""
        yield Path(self("mount", container).stdout.strip())
        self("umount", container)

    def layers(self, image: str) -> list[set[str]]:
        """Names in each layer of an image, the base's first: what a later layer deletes is seen as well."""
        out = self.root / "layers"
        self("push", "--quiet", "--disable-compression", image, f"dir:{out}", timeout=900)
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        names = []
        for layer in manifest["layers"]:
            with tarfile.open(out / layer["digest"].removeprefix("sha256:")) as archive:
                names.append({name.removeprefix("./") for name in archive.getnames()})
        shutil.rmtree(out)
        return names

    def close(self) -> None:
        """Remove containers, images, and the folder."""
        self("rm", "--all", check=False)
        self("rmi", "--all", "--force", check=False)
        shutil.rmtree(self.root)


def mounted_by(root: Path) -> list[str]:
    """Processes, in whatever mount namespace, that have something mounted from a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            mounts = path.read_text(encoding="utf-8")
        except OSError:  # it has just ended
            continue
        if str(root) in mounts:
            found.append(path.parent.name)
    return found


def _pip_mounts(root: Path) -> list[str]:
    """What a build needs to reach the indexes that this machine's pip is set up with."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    wanted = re.findall(r"^(?:\S+)\.(index-url|extra-index-url|find-links|trusted-host|cert)='(.*)'$", listed, re.M)
    settings = "".join(f"{key} = {value}\n" for key, value in dict(wanted).items())
    (root / "pip.conf").write_text(f"[global]\n{settings}", encoding="utf-8")
    # A folder of the file system that an index or a list of links is in. The folder above an index: files beside it.
    paths = {Path(path) for path in re.findall(r"(?<![\w/:])(?:file://)?(/[^\s']+)", settings)}
    folders = {path.parent if path.name == "simple" or path.is_file() else path for path in paths if path.exists()}
    mounts = [f"{root / 'pip.conf'}:/etc/pip.conf", *(f"{folder}:{folder}" for folder in sorted(folders))]
    if Path("/etc/ssl/certs") not in folders and Path("/etc/ssl/certs").is_dir():
        mounts.append("/etc/ssl/certs:/etc/ssl/certs")
    return [f"--volume={mount}:ro" for mount in mounts]


def python_base(buildah: Buildah, tag: str, suite: str = "bookworm") -> None:
    """Make an image with Python 3.11 and pip, and nothing else, out of Debian's packages."""
    archive = buildah.root / "base.tar"
    packages = "python3,python3-pip,python3-venv,ca-certificates"
    command: Sequence[str] = ("mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", suite)
    done = subprocess.run([*command, str(archive)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    name = buildah("from", "--quiet", "scratch").stdout.split()[-1]
    buildah("add", "--quiet", name, str(archive), "/")
    # neither python:3.11-slim nor NVIDIA's images keep pip from the system's Python, and both have `python`
    buildah.run(name, "sh", "-c", "rm /usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 /usr/bin/python")
    buildah("commit", "--quiet", "--rm", name, tag)
    archive.unlink()
