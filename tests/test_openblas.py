import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dora import openblas


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**_clean_environment(), **environment},
    )
    return done.stdout + done.stderr


def _clean_environment() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


@pytest.fixture
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Imitate Linux with MLX's CPU build, in a process that has not loaded OpenBLAS."""
    monkeypatch.setattr(openblas, "_status", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(openblas, "_is_cpu_build", lambda: True)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core")
    return monkeypatch


def test_preload_imports_no_mlx() -> None:
    code = (
        "import sys; from mlx_dora import openblas; openblas.preload();"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')])"
    )
    assert run(code).splitlines()[0] == "[]"


def test_preload_after_mlx_warns_once_and_reports_too_late(
    cpu_build: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu_build.setitem(sys.modules, "mlx.core", sys)
    first, second = openblas.preload(), openblas.preload()
    assert first == second
    assert first.state == "too late"
    assert [record.getMessage() for record in caplog.records] == [first.message]
    assert "LD_PRELOAD=libopenblas.so.0" in first.message


def test_a_missing_library_is_a_warning_with_the_remedy(
    cpu_build: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu_build.setattr(openblas, "LIBRARY", "libno-such-blas.so.0")
    cpu_build.setattr(openblas, "WHEEL", "no-such-wheel")
    assert openblas.preload().state == "missing"
    assert "no-such-wheel is not installed" in caplog.text
    assert "apt-get install libopenblas0-pthread" in caplog.text


def test_a_missing_patchelf_is_named(
    cpu_build: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("scipy_openblas32")
    cpu_build.setattr(openblas, "LIBRARY", "libno-such-blas.so.0")
    cpu_build.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_build.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    cpu_build.setenv("PATH", str(tmp_path))
    assert openblas.preload().state == "missing"
    assert "patchelf is not installed" in caplog.text
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx_dora"]


def test_the_wheel_is_used_if_the_system_has_no_openblas(tmp_path: Path) -> None:
    pytest.importorskip("scipy_openblas32")
    if openblas.preload().state == "not needed":
        pytest.skip("this build of MLX needs no OpenBLAS")
    # Alone, since the package itself would load the system's library first.
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("openblas", {openblas.__file__!r})
alone = importlib.util.module_from_spec(spec)
sys.modules["openblas"] = alone
spec.loader.exec_module(alone)
alone.LIBRARY = "libno-such-blas.so.0"
print(alone.preload().message)
from mlx_dora.doctor.checks import matmul_gflops
print(matmul_gflops())
"""
    message, gflops = run(code, XDG_CACHE_HOME=str(tmp_path)).splitlines()
    (copy,) = (tmp_path / "mlx_dora").iterdir()
    assert message == f"scipy-openblas32 was loaded before mlx.core: {copy}."
    assert float(gflops) > 8  # the reference BLAS reaches 2


def test_nothing_to_do_on_a_mac(cpu_build: pytest.MonkeyPatch) -> None:
    cpu_build.setattr(sys, "platform", "darwin")
    assert openblas.preload().state == "not needed"


def test_nothing_to_do_with_a_gpu_build(cpu_build: pytest.MonkeyPatch) -> None:
    cpu_build.setattr(openblas, "_is_cpu_build", lambda: False)
    assert openblas.preload().state == "not needed"


def test_ld_preload_is_recognized(cpu_build: pytest.MonkeyPatch) -> None:
    cpu_build.setenv("LD_PRELOAD", "/usr/lib/libopenblas.so.0")
    assert openblas.preload().state == "environment"


def test_a_preloaded_library_makes_float32_products_fast() -> None:
    if openblas.preload().state != "loaded":
        pytest.skip("OpenBLAS is not installed, or not for this build of MLX")
    code = (
        "from mlx_dora import openblas; openblas.preload();"
        "from mlx_dora.doctor.checks import matmul_gflops; print(matmul_gflops())"
    )
    # The reference BLAS reaches 2. The bound is low, so that a busy machine passes.
    assert float(run(code).splitlines()[0]) > 8


def test_one_thread_is_restored_after_the_last_user() -> None:
    libraries = openblas._loaded()
    if not libraries:
        pytest.skip("no OpenBLAS in this process")
    counts = [getter for _, getter in libraries]
    before = [get() for get in counts]  # 1 in tests
    for set_threads, _ in libraries:
        set_threads(2)
    try:
        with openblas.one_thread():
            with openblas.one_thread():
                assert {get() for get in counts} == {1}
            assert {get() for get in counts} == {1}
        assert {get() for get in counts} == {2}
        with pytest.raises(KeyError), openblas.one_thread():
            raise KeyError
        assert {get() for get in counts} == {2}
    finally:
        for (set_threads, _), number in zip(libraries, before, strict=True):
            set_threads(number)


def test_one_thread_limits_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [4, 2]

    def functions(i: int):
        return lambda n: counts.__setitem__(i, n), lambda: counts[i]

    monkeypatch.setattr(openblas, "_loaded", lambda: [functions(0), functions(1)])
    with openblas.one_thread():
        assert counts == [1, 1]
    assert counts == [4, 2]


def test_processes_of_one_machine_share_its_cores(
    cpu_build: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:1"], ["127.0.0.1:1"], ["10.0.0.1:2", "10.0.0.2:2"]]')
    cpu_build.setattr(openblas, "LIBRARY", "libno-such-blas.so.0")
    cpu_build.setattr(openblas, "_copy_of_wheel", lambda: Path("none.so"))
    cpu_build.setattr(os, "sched_getaffinity", lambda _: {*range(6)}, raising=False)
    cpu_build.setenv("MLX_HOSTFILE", str(hosts))
    cpu_build.setenv("OPENBLAS_NUM_THREADS", "1")  # restored at the end
    chosen = {}
    for rank in ("0", "1", "7"):
        cpu_build.delenv("OPENBLAS_NUM_THREADS", raising=False)
        cpu_build.setenv("MLX_RANK", rank)
        cpu_build.setattr(openblas, "_status", None)
        openblas.preload()
        chosen[rank] = os.environ.get("OPENBLAS_NUM_THREADS")
    assert chosen == {"0": "3", "1": None, "7": None}
    cpu_build.setenv("OPENBLAS_NUM_THREADS", "5")
    cpu_build.setenv("MLX_RANK", "0")
    cpu_build.setattr(openblas, "_status", None)
    openblas.preload()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "5"
