"""Tables of study 2: rewards of the methods, and H8."""

import numpy as np
from decide import holm, shortfall
from reward_grid import CHOOSING_SEED, METHODS, MORE_SEEDS, SEEDS, Results

SMALLEST = 0.02
"""Smallest difference of interest, of the mean reward."""


def by_method(results: Results) -> dict[str, dict[int, list[float]]]:
    """Rewards on the test prompts by method and seed."""
    rewards: dict[str, dict[int, list[float]]] = {}
    for method in METHODS:
        for job, line in results.items():
            if job.method == method and job.seed != CHOOSING_SEED:
                rewards.setdefault(method, {})[job.seed] = line["rewards"]
    return rewards


def reward_tables(results: Results) -> str:
    """Mean reward of each method, and its difference from LoRA's."""
    rewards = by_method(results)
    count = len(SEEDS) + len(MORE_SEEDS)
    rows = ["| method | trained | rate | untrained | reward | seeds |"]
    rows.append("| --- " * 6 + "|")
    for method, of in rewards.items():
        [first, *_] = [
            line
            for job, line in results.items()
            if job.method == method and job.seed != CHOOSING_SEED
        ]
        means = [float(np.mean(values)) for values in of.values()]
        spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
        rows.append(
            f"| {method} | {first['trainable']:,} | {first['rate']:.2g} | "
            f"{first['untrained_reward']:.3f} | {np.mean(means):.3f}{spread} | "
            f"{len(of)} of {count} |"
        )
    missing = [method for method in METHODS if method not in rewards]
    if missing:
        rows.append(f"\nNo run yet at the chosen rate: {', '.join(missing)}.")
    return "\n".join(rows) + "\n\n" + _against_lora(rewards)


def _against_lora(rewards: dict[str, dict[int, list[float]]]) -> str:
    compared = []
    for method in METHODS:
        seeds = sorted(rewards.get(method, {}).keys() & rewards.get("lora", {}).keys())
        if method != "lora" and len(seeds) > 1:
            pair = tuple(
                np.array([rewards[name][seed] for seed in seeds])
                for name in (method, "lora")
            )
            compared.append((method, len(seeds), shortfall((pair[0], pair[1]))))
    rows = ["| against LoRA | seeds | difference of the mean reward | verdict |"]
    rows.append("| --- " * 4 + "|")
    corrected = holm([result.p for *_, result in compared])
    for (method, count, result), p in zip(compared, corrected, strict=True):
        interval = f"{-result.mean:+.3f} ({-result.high:+.3f} to {-result.low:+.3f})"
        verdict = result.verdict(p, SMALLEST)
        rows.append(f"| {method} | {count} | {interval} | {verdict} |")
    return "\n".join(rows)
