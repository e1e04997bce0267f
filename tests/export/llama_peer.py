"""What llama.cpp computes, in a process of its own: ``llama_peer.py FOLDER``.

Reads ``job.json`` (model, adapter or null, tokens, prompt, count) and writes
``out.npz`` with the logits of `tokens` and `count` greedy tokens after `prompt`.
"""
# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    length = max(len(job["tokens"]), len(job["prompt"]) + job["count"]) + 8
    model = llama_cpp.Llama(
        model_path=job["model"], lora_path=job["adapter"], n_ctx=length, n_batch=length,
        n_ubatch=length, logits_all=True, verbose=False, n_threads=1,
        n_threads_batch=1, flash_attn=False, type_k=0, type_v=0,
    )  # fmt: skip
    model.eval(job["tokens"])
    logits = np.array(model.scores[: len(job["tokens"])], np.float32)
    model.reset()
    tokens, feed = [], job["prompt"]
    for _ in range(job["count"]):
        model.eval(feed)
        feed = [int(np.argmax(model.scores[model.n_tokens - 1]))]
        tokens += feed
    np.savez(folder / "out.npz", logits=logits, tokens=np.array(tokens))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
