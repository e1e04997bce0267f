#!/usr/bin/env bash
# First call: is everything right, and how fast is each kernel? About 5 minutes.
#   OUT=FOLDER bash kit/project/benchmarks/gpu/call1.sh     in the folder that holds kit/
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
groups=(${GROUPS_:-rows norm packed fused scale back half})
for group in "${groups[@]}"; do
    start "$group" 280 "$PYTHON" "$GPU/op_times.py" --group "$group" \
        --output "$OUT/ops.jsonl" ${TINY:+--tiny}
done
turns 150 40 "${groups[@]}"
keep
"$PYTHON" .ci/gpu.py "$OUT/check" --only doctor grid layers kernels train ${TINY:+--anyway} |
    tee "$OUT/check.txt"
keep
cat "$OUT"/{rows,norm,packed,fused,scale,back,half}.txt 2>/dev/null | grep ratio
