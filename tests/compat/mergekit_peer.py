"""What mergekit does, in a process of its own: ``mergekit_peer.py CONFIG OUT``.

Merges by its YAML on the CPU and prints seconds and peak memory as one JSON line.
"""
# pyright: reportMissingImports=false
# mergekit belongs to the extra `peers`, which few machines install.

import json
import sys
import time

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peak import peak_bytes  # the script's own folder is in the path


def main() -> None:
    import yaml

    started, cpu = time.perf_counter(), time.process_time()
    with open(sys.argv[1]) as file:  # noqa: PTH123 - plain Python is all that is here
        config = MergeConfiguration.model_validate(yaml.safe_load(file))
    options = MergeOptions(lazy_unpickle=False, copy_tokenizer=True, quiet=True)
    run_merge(config, sys.argv[2], options=options)
    told = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
