from dataclasses import replace

from mlx_dora import DoRAConfig
from mlx_dora.data.counts import RowSizes
from mlx_dora.train import TrainConfig
from mlx_dora.train.plan.hub_models import fitting_models

# As published: the totals in the models' safetensors indexes.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "google/gemma-2-2b-it": 2_614_341_888,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-9b-it": 9_241_705_984,
    "microsoft/phi-4": 14_659_507_200,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}


def test_twenty_models_are_planned_from_their_published_sizes() -> None:
    train, dora, limit = TrainConfig(), DoRAConfig(), 20 * 10**9
    sizes = RowSizes.of_lengths([200] * 8)
    models = fitting_models(train, dora, sizes, limit)
    assert {model.name: model.parameters for model in models} == PARAMETERS
    for model in models:
        weights = 2 * model.parameters
        assert weights < model.peak_16bit < weights + 20e9
        saved = model.peak_16bit - model.peak_4bit
        assert 1.43 < saved / model.parameters < 1.4376  # 2 bytes become 0.5625
        if model.fits == "16-bit":
            assert model.peak_16bit <= limit
        elif model.fits == "4-bit":
            assert model.peak_4bit <= limit < model.peak_16bit
        else:
            assert model.peak_4bit > limit
    fits = {model.name.partition("/")[2]: model.fits for model in models}
    assert fits["SmolLM2-135M-Instruct"] == "16-bit"
    assert fits["Llama-3.1-8B-Instruct"] == "4-bit"
    assert fits["Llama-3.3-70B-Instruct"] is None
    sizes = RowSizes.of_lengths([900] * 8)
    longer = fitting_models(replace(train, max_seq_length=400), dora, sizes, limit)
    assert all(a.peak_4bit < b.peak_4bit for a, b in zip(models, longer, strict=True))
