"""The CUDA execution provider behind the same code: caches and activations on the device, every cut equal.

Whole and split run on the same provider in the same precision. cuBLAS may choose another algorithm for another
number of rows, so a batch is held to the unsplit model token by token, and a lone sequence bit by bit.
"""

import itertools

import numpy as np
import onnxruntime as ort
import pytest

from agent.kv import copy_row
from agent.memory import allocate
from agent.sampling import choose
from models.importer import import_model
from models.reference import Reference
from models.store import Store
from profiler.calibrate import calibrate
from schemas.deployment import Settings
from schemas.errors import ResplitError
from schemas.frame import Sampling
from tests import model_zoo
from tests.route_harness import EngineCache, Route, stages

GREEDY = Sampling(logprobs=1)
SETTINGS = Settings(chunk_tokens=16, context_tokens=128, max_sequences=16)


def cuda_works() -> bool:
    try:
        calibrate("cuda", 1)
    except ResplitError:
        return False
    return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers() or not cuda_works(), reason="no GPU"
    ),
]


@pytest.fixture(scope="module", params=["fp32", "fp16", "int4"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    store = Store(tmp_path_factory.mktemp("store"))
    folder = model_zoo.decoder_folder(tmp_path_factory.mktemp("zoo"), "qwen3")
    _, digest = import_model(str(folder), store, "qwen3", request.param, provider="cuda")
    return EngineCache(store, digest, device="cuda")


def test_every_cut_of_one_sequence_is_bit_equal_on_the_gpu(engines: EngineCache) -> None:
    count = len(engines.manifest.blocks)
    prompt = [int(t) for t in np.random.default_rng(0).integers(3, 500, 40)]
    reference = Reference(engines.store, "qwen3", "cuda")
    reference.generate(prompt, 8, chunk_tokens=16, context_tokens=128)
    expected = [choose(logits, GREEDY, i) for i, logits in enumerate(reference.logits)]
    for cuts in itertools.chain(([c] for c in range(1, count)), map(list, itertools.combinations(range(1, count), 2))):
        [output] = Route(engines, stages(cuts, count), SETTINGS).generate([prompt], 8, GREEDY)
        assert [(t.token, t.logprob) for t in output.detailed] == [(c.token, c.logprob) for c in expected], cuts


def test_sixteen_concurrent_sequences_give_the_unsplit_models_tokens_on_the_gpu(engines: EngineCache) -> None:
    rng = np.random.default_rng(1)
    prompts = [[int(t) for t in rng.integers(3, 500, n)] for n in range(1, 49, 3)]
    reference = Reference(engines.store, "qwen3", "cuda")
    expected = [reference.generate(p, 8, chunk_tokens=16, context_tokens=128, stop_at_eos=False) for p in prompts]
    outputs = Route(engines, stages([2, 4], len(engines.manifest.blocks)), SETTINGS).generate(prompts, 8)
    assert [output.tokens for output in outputs] == expected


def test_a_cache_row_is_copied_on_the_device() -> None:
    buffer = allocate("cuda", (3, 2, 4, 8), "float16")
    filled = np.arange(3 * 2 * 4 * 8, dtype=np.float16).reshape(3, 2, 4, 8)
    buffer.fill(filled)
    copy_row(buffer, 2, 0)
    assert np.array_equal(buffer.read()[0], filled[2])
    assert np.array_equal(buffer.read()[1:], filled[1:])


def test_what_is_written_to_the_device_is_read_back() -> None:
    buffer = allocate("cuda", (5, 7), "float32")
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    buffer.fill(values)
    assert np.array_equal(buffer.read(), values)
