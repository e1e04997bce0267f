# Sourced by the calls, in the folder that holds kit/: unpacks it, and sets the environment.
# OUT receives results; WORK (default: ~/mlx_dora_gpu) holds what is unpacked and compiled.
set -uo pipefail
OUT=$(mkdir -p "${OUT:-results}" && cd "${OUT:-results}" && pwd)
PYTHON=${PYTHON:-python3}
export OUT WORK=${WORK:-$HOME/mlx_dora_gpu}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=4 TURN_FOLDER=$WORK/turns
rm -rf "$TURN_FOLDER"
mkdir -p "$WORK/site" "$TURN_FOLDER"
if [[ -e kit/site.tar.xz && ! -e $WORK/site/mlx ]]; then
    "$PYTHON" -c "import sys, tarfile; tarfile.open(sys.argv[1], 'r:xz').extractall(sys.argv[2])" \
        kit/site.tar.xz "$WORK/site"
fi
PROJECT=${PROJECT:-$PWD/kit/project}
GPU=$PROJECT/benchmarks/gpu
# MLX looks for CUDA's libraries beside itself; torch has brought them.
"$PYTHON" - "$WORK/site" <<'PY' || true
import sys
from pathlib import Path

import nvidia

for place in map(Path, nvidia.__path__):
    link = Path(sys.argv[1]) / "nvidia"
    if (place / "cu13").is_dir() and not link.exists():
        link.symlink_to(place)
PY
export PYTHONPATH=$WORK/site:$PROJECT
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null ||
    echo "no NVIDIA GPU here"
cd "$PROJECT" || exit 1

# start NAME LIMIT COMMAND...: in the background, with a cache of compiled modules of its own,
# since MLX does not write it atomically.
start() {
    local name=$1 limit=$2
    shift 2
    (
        TURN=$name MLX_PTX_CACHE_DIR=$WORK/ptx/$name timeout "$limit" "$@" \
            >"$OUT/$name.txt" 2>&1
        echo "status $?" >>"$OUT/$name.txt"
        touch "$TURN_FOLDER/$name.dead"
    ) &
}

# turns READY_BY LIMIT NAME...: let the processes measure one after another.
turns() {
    "$PYTHON" "$GPU/_turns.py" "$@"
}

# keep: put all texts and figures of OUT into one file, which survives a call cut off.
keep() {
    tar -c -C "$OUT" --exclude=all.tgz . | gzip >"$OUT/.all.tgz" && mv "$OUT/.all.tgz" "$OUT/all.tgz"
}
