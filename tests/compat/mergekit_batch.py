"""What mergekit does, for many files in one process: ``mergekit_batch.py JOBS``.

JOBS is a JSON file with a list of [config file, output folder, seed]; files are read as
``mergekit-yaml`` reads them. Prints the error of each job as JSON; null for none.
"""
# pyright: reportMissingImports=false
# mergekit belongs to the extra `peers`, which few machines install.

import json
import sys

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    torch.set_num_threads(1)
    errors = []
    with open(sys.argv[1]) as file:  # noqa: PTH123 - plain Python is all that is here
        jobs = json.load(file)
    for path, out, seed in jobs:
        try:
            with open(path) as file:  # noqa: PTH123
                content = yaml.safe_load(file.read())
            options = MergeOptions(
                quiet=True,
                write_model_card=False,
                random_seed=seed,
                lora_merge_cache="lora_cache",
            )
            run_merge(MergeConfiguration.model_validate(content), out, options=options)
            errors.append(None)
        # A refusal may be of any kind: it is a result here.
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:200])
    print(json.dumps(errors))  # noqa: T201


if __name__ == "__main__":
    main()
