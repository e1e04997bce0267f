import os

# OpenBLAS reads it when it is loaded. Its threads spin while they wait for each other,
# so two workers with two threads each on two cores take several times as long as with
# one. `OPENBLAS_NUM_THREADS=2 pytest` tries products that are divided among threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from mlx_dora import openblas

openblas.preload()  # before anything imports mlx: a hundredfold on Linux

import json  # noqa: E402 - the lines above come first
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On the CPU `mx.compile` runs a C++ compiler, which takes most of a test's time. Tests
# marked `compiled`, and the demo in CI, compile; commands that tests start do not.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import pytest  # noqa: E402

from tests.browser import browser  # noqa: E402, F401 - a fixture

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine's MLX cannot run."""
    has_metal = mx.metal.is_available()
    has_cuda = not has_metal and mx.default_device().type == mx.gpu
    for item in items:
        if item.get_closest_marker("metal") and not has_metal:
            item.add_marker(pytest.mark.skip(reason="no Apple GPU here"))
        if item.get_closest_marker("cuda") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True, scope="session")
def choices_stay_out_of_the_cache(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """Keep what tests measure on a GPU in a folder of their own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_dora.kernels.kept.cache_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def compile_where_that_is_tested(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let `mx.compile` compile in tests marked ``compiled`` only."""
    if request.node.get_closest_marker("compiled") is None:
        mx.disable_compile()
        yield
        return
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture
def make_tiny_model() -> Callable[..., nn.Module]:
    """Build random two-layer Llamas: ``make_tiny_model(seed=0, dtype=..., bits=4)``.

    Keywords besides `seed`, `dtype`, `bits` and `group_size` change the model's config,
    as in ``make_tiny_model(tie_word_embeddings=False)``.
    """
    from mlx_lm.models import llama

    def make(
        *,
        seed: int = 0,
        dtype: mx.Dtype = mx.float32,
        bits: int | None = None,
        group_size: int = 32,
        **config: Any,
    ) -> nn.Module:
        mx.random.seed(seed)
        model = llama.Model(llama.ModelArgs.from_dict({**TINY_CONFIG, **config}))
        model.set_dtype(dtype)
        if bits is not None:
            nn.quantize(model, group_size=group_size, bits=bits)
        mx.eval(model.parameters())
        return model

    return make


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., nn.Module]) -> nn.Module:
    """A fresh random two-layer Llama: float32, hidden size 32, tied embeddings."""
    return make_tiny_model()


def write_tiny_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of 320 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue] - a property in the stubs
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_CONFIG["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and then returns a string "
    tokenizer.train_from_iterator([text, "What does the function return?"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def make_tiny_folder(
    make_tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> Callable[..., Path]:
    """Save a tiny model where `mlx_lm.load` reads it: ``make_tiny_folder("name")``.

    Takes the keywords of `make_tiny_model`.
    """
    from mlx.utils import tree_flatten

    def make(
        name: str = "tiny", *, bits: int | None = None, group_size: int = 32, **kw: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        model = make_tiny_model(bits=bits, group_size=group_size, **kw)
        own = ("seed", "dtype")
        config = {**TINY_CONFIG, **{k: v for k, v in kw.items() if k not in own}}
        if bits is not None:
            config["quantization"] = {"group_size": group_size, "bits": bits}
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(
            str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
        )
        (folder / "config.json").write_text(json.dumps(config))
        write_tiny_tokenizer(folder)
        return folder

    return make


@pytest.fixture
def tiny_model_folder(make_tiny_folder: Callable[..., Path]) -> Path:
    """The model of `tiny_model` on disk, with a tokenizer and a chat template."""
    return make_tiny_folder()


@pytest.fixture(scope="session")
def kept_folder(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folders by name, kept from run to run in pytest's cache.

    Without that cache (``-p no:cacheprovider``) they are kept for this run only.
    """
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp if cache is None else cache.mkdir


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of SmolLM2-135M-Instruct; mark its tests ``real_model``."""
    from mlx_dora.demo.model import demo_model
    from mlx_dora.errors import DoRAError

    try:
        return demo_model()
    except DoRAError as error:
        pytest.skip(str(error))
