#!/usr/bin/env bash
# Second call: whole steps, memory, decoding, losses, and PEFT's steps. About 5 minutes.
#   OUT=FOLDER bash kit/project/benchmarks/gpu/call2.sh     in the folder that holds kit/
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ranks=(${RANKS:-8 64 384})
start dense 290 "$PYTHON" "$GPU/steps.py" --ranks "${ranks[@]}" \
    --output "$OUT/steps.jsonl" ${TINY:+--tiny}
start packed4 290 "$PYTHON" "$GPU/steps.py" --bits 4 --ranks "${ranks[@]:0:2}" \
    --output "$OUT/steps.jsonl" ${TINY:+--tiny}
start peft 290 "$PYTHON" "$GPU/peft_steps.py" --ranks "${ranks[@]}" \
    --output "$OUT/steps.jsonl" ${TINY:+--tiny}
turns 200 120 dense peft packed4
keep
cat "$OUT"/{dense,packed4,peft}.txt | grep '"what"'
