"""Which execution providers of ONNX Runtime can be used on this machine."""

import ctypes
import logging
from typing import Literal

import onnxruntime as ort

from schemas.errors import ErrorCode, ResplitError

Provider = Literal["cpu", "cuda"]
EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DRIVER = "libcuda.so.1"
"""NVIDIA's driver, wherever it is: without it ONNX Runtime would say so at length on stderr."""

log = logging.getLogger(__name__)


def require(provider: Provider) -> str:
    """ONNX Runtime's name of a provider that this machine may have, its libraries loaded; raises PROVIDER_UNAVAILABLE.

    Whether it works shows in the first session alone: `ort.InferenceSession` leaves it out without an error.
    """
    name = EXECUTION_PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise unavailable(provider, "this build of ONNX Runtime does not contain it")
    if provider == "cuda":
        try:
            ctypes.CDLL(DRIVER)
        except OSError as error:
            raise unavailable(provider, "there is no NVIDIA driver") from error
        # The CUDA and cuDNN libraries may be the ones installed as Python packages.
        try:
            ort.preload_dlls()
        except Exception as error:
            log.warning("preloading the CUDA libraries failed: %s", error)
    return name


def unavailable(provider: Provider, why: str) -> ResplitError:
    """The error for a provider that cannot be used."""
    message = f"{provider!r} cannot be used here: {why}; install the driver and 'resplit[cuda]', or use 'cpu'"
    return ResplitError(ErrorCode.PROVIDER_UNAVAILABLE, message, "provider")
