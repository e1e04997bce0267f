#!/usr/bin/env bash
# Make kit.tar (about 25 MB) in the folder given: all that a machine with one GPU, Python 3.12
# and torch's CUDA 13 libraries, but no network, needs to run this project on MLX's CUDA build.
#
#   benchmarks/gpu/pack.sh FOLDER          needs pip, unzip, xz and git
#
# The project goes in as committed. ARCH (default 90, Hopper) is the GPU's compute capability.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$(mkdir -p "${1:?usage: pack.sh FOLDER}" && cd "$1" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/mlx_dora-kit.XXXXXX")
trap 'rm -rf "$work"' EXIT
mlx=${MLX_VERSION:-0.32.4}
lm=${MLX_LM_VERSION:-0.32.2}
mkdir -p "$work/wheels" "$work/site" "$work/kit/project"

python3 -m pip download -q --no-deps --only-binary=:all: -d "$work/wheels" \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_35_x86_64 --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform any \
    "mlx==$mlx" "mlx-cuda-13==$mlx" "mlx-lm==$lm"
for wheel in "$work"/wheels/*.whl; do
    unzip -q -o "$wheel" -d "$work/site"
done
library=$work/site/mlx/lib/libmlx.so
python3 "$here/shrink_cuda.py" "$library" "$work/libmlx.so" --arch "${ARCH:-90}"
mv "$work/libmlx.so" "$library"

# The package is used from its checkout; its metadata makes version() work.
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/mlx_dora/__init__.py")
metadata=$work/site/mlx_dora-$version.dist-info
mkdir -p "$metadata"
printf 'Metadata-Version: 2.1\nName: mlx_dora\nVersion: %s\n' "$version" >"$metadata/METADATA"

tar -c -C "$work/site" . | xz -6 -T0 >"$work/kit/site.tar.xz"
git -C "$root" archive HEAD | tar -x -C "$work/kit/project"
git -C "$root" rev-parse HEAD >"$work/kit/commit"
tar -c -C "$work" -f "$out/kit.tar" kit
ls -l "$out/kit.tar"
