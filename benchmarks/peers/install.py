"""Install the peers, each from the package registry and in the version that constraints.txt names:

    python -m benchmarks.peers.install

They live in build/peers, in an environment of their own. llama.cpp is built from the sources that the sdist of
llama-cpp-python carries, with its RPC backend; that takes a C++ compiler and, on two cores, some ten minutes. What
cannot be installed is noted, with the reason, and `benchmarks.peers` says so where its figures would be.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

FOLDER = Path("build") / "peers"
NOTE = "installed.json"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
SDIST = "llama-cpp-python"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_RPC=ON",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
"""`GGML_NATIVE` compiles for the processor of this machine; the rest leaves out what is not measured."""
TARGETS = ("llama-server", "ggml-rpc-server")
TAIL = 300


@dataclass(frozen=True)
class Installed:
    """What there is of the peers."""

    folder: Path
    noted: dict[str, dict[str, str]]

    @property
    def python(self) -> Path:
        """Of the peers' environment."""
        return self.folder.absolute() / "venv" / "bin" / "python"

    @property
    def llama_bin(self) -> Path:
        return self.folder.absolute() / "llama" / "bin"

    def missing(self, peer: str) -> str | None:
        """Why a peer cannot take part, if so."""
        return self.noted.get(peer, {"missing": "not installed: python -m benchmarks.peers.install does"}).get(
            "missing"
        )


def installed(folder: Path = FOLDER) -> Installed:
    """What was installed, as it was noted."""
    note = folder / NOTE
    return Installed(folder, json.loads(note.read_text()) if note.exists() else {})


def install(folder: Path = FOLDER) -> None:
    """Install what is not there yet, and note how each peer came out."""
    folder.mkdir(parents=True, exist_ok=True)
    noted = {}
    for peer, make in (("ray", _ray), ("llama.cpp", _llama)):
        try:
            noted[peer] = make(folder)
        except (subprocess.CalledProcessError, OSError) as error:
            said = (getattr(error, "stderr", None) or getattr(error, "stdout", None) or str(error)).strip()
            noted[peer] = {"missing": f"not installed: {said[-TAIL:]}"}
        print(f"{peer}: {noted[peer]}", flush=True)
    (folder / NOTE).write_text(json.dumps(noted, indent=2) + "\n")


def _ray(folder: Path) -> dict[str, str]:
    """Ray, what writes GGUF, the tools that build llama.cpp, and the ONNX Runtime that Resplit has."""
    if not (folder / "venv" / "bin" / "python").exists():
        _run([sys.executable, "-m", "venv", folder / "venv"])
    same = [f"{name}=={version(name)}" for name in ("onnxruntime-gpu", "numpy")]
    pip: list[str | Path] = [folder / "venv" / "bin" / "pip", "install", "--constraint", CONSTRAINTS]
    _run([*pip, *same, "ray", "gguf", "cmake", "ninja"])
    return {"version": _pinned("ray")}


def _llama(folder: Path) -> dict[str, str]:
    tools = (folder / "venv" / "bin").absolute()
    source = _source(folder)
    built = folder / "llama"
    if not all((built / "bin" / target).exists() for target in TARGETS):
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        _run([tools / "cmake", "-G", "Ninja", "-S", source, "-B", built, *OPTIONS], environment)
        _run([tools / "cmake", "--build", built, "-j", "2", "--target", *TARGETS], environment)
    compiler = _run(["c++", "--version"]).splitlines()[0]
    return {"version": f"{SDIST} {_pinned(SDIST)}", "options": " ".join(OPTIONS), "compiler": compiler}


def _source(folder: Path) -> Path:
    """llama.cpp as the sdist carries it."""
    found = folder / f"{SDIST.replace('-', '_')}-{_pinned(SDIST)}" / "vendor" / "llama.cpp"
    if not found.exists():
        sdists = folder / "sdist"
        pip: list[str | Path] = [folder / "venv" / "bin" / "pip", "download", "--no-deps", "--no-binary", SDIST]
        _run([*pip, "--dest", sdists, f"{SDIST}=={_pinned(SDIST)}"])
        [archive] = sdists.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        shutil.rmtree(sdists)
    return found


def _pinned(package: str) -> str:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    return str(pins[package])


def _run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> str:
    """Its output. Raises CalledProcessError, with its last words, and OSError where there is no such program."""
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    install()
