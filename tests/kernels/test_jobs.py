import mlx.core as mx

from mlx_dora.doctor import examine as examining
from mlx_dora.doctor import jobs, traffic
from mlx_dora.kernels.dispatch import relative_error
from mlx_dora.kernels.trial import flat

SQUARE = (4096, 4096)
MB = 1 << 20


def small_jobs() -> list[jobs.Job]:
    return list(examining._small_jobs())


def test_every_job_runs_plain_and_compiled_to_the_same_values() -> None:
    for job in small_jobs():
        plain = flat(job.reference(*job.arrays))
        compiled = flat(mx.compile(job.reference)(*job.arrays))
        assert relative_error(compiled, plain) < 1e-2, job.name


def test_the_checks_cover_every_kernel_dtype_and_width() -> None:
    names = [(job.name, job.dtype) for job in small_jobs()]
    assert len(names) == len(set(names)) == 3 * 10


def test_large_operands_move_once() -> None:
    half, packed = 2 * 4096 * 4096, 4096 * 4096 // 2 + 2 * 2 * 4096 * 64
    sums = 2 * 4 * 2 * 16 * 4096  # of 16 strips, written and read
    for r, strips in ((8, 16), (64, 32)):
        norm = traffic.adapted_norm_traffic(SQUARE, r, mx.bfloat16)
        assert norm.large == half + sums * strips // 16
        four = traffic.adapted_norm_packed_traffic(SQUARE, r, 4, 64, mx.bfloat16)
        assert four.large == packed + sums
        fused = traffic.fused_weight_traffic(SQUARE, r, mx.bfloat16)
        assert fused.large == 2 * half
        scale = traffic.dora_scale_traffic((2048, 4096), r, mx.bfloat16)
        assert scale.large == half
    for columns, passes in ((4096, 2), (14336, 2), (16512, 3)):
        size = 2 * 4096 * columns
        shape = (4096, columns)
        assert traffic.normalize_rows_traffic(shape, mx.bfloat16).large == passes * size
        fused = traffic.fused_weight_traffic(shape, 8, mx.bfloat16)
        assert fused.large == passes * size
    backward = traffic.dora_scale_backward_traffic(
        (2048, 4096), mx.bfloat16, False, cores=32
    )
    chunk = 2048 * 16 // (8 * 32)  # tokens, for 8 threadgroups a core
    assert backward.large == 3 * half // 2 + 2 * 4 * 2048 // chunk * 4096


def test_what_is_read_again_fits_in_two_megabytes() -> None:
    for r in (8, 64):
        for moved in (
            traffic.adapted_norm_traffic(SQUARE, r, mx.bfloat16),
            traffic.adapted_norm_packed_traffic(SQUARE, r, 4, 64, mx.bfloat16),
            traffic.fused_weight_traffic(SQUARE, r, mx.bfloat16),
            traffic.dora_scale_traffic((2048, 4096), r, mx.bfloat16),
        ):
            assert 0 < moved.cached <= 2 * MB
            assert moved.rereads >= moved.cached
