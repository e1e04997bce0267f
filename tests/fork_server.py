"""A process that has imported everything and forks itself on request.

`tests.processes` starts it as ``python -m tests.fork_server FD``. A request is a line
of JSON (the words that follow ``python``, the folder and the environment) with four
file descriptors: the standard streams, and a pipe for the process's number and status.
"""

import json
import os
import runpy
import signal
import socket
import sys
from typing import Any


def preload() -> None:
    """Import what our commands import. Nothing is computed: threads do not fork."""
    import mlx_lm  # noqa: F401
    from mlx_lm.models import llama  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import mlx_dora.cli.fuse  # loads OpenBLAS before MLX
    import mlx_dora.cli.merge
    import mlx_dora.cli.train  # noqa: F401


def serve(channel: socket.socket) -> dict[str, Any]:
    """Answer requests; return the request in the process that is to carry it out."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a minder
    while True:
        line, files = b"", []
        while not line.endswith(b"\n"):
            part, more, *_ = socket.recv_fds(channel, 1 << 20, 4)
            if not part:
                os._exit(0)
            line, files = line + part, files + more
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            mind(files)
            return json.loads(line)
        for file in files:
            os.close(file)


def mind(files: list[int]) -> None:
    """Fork the process with its streams, report its number, wait, report its status."""
    *streams, status = files
    child = os.fork()
    if child == 0:
        for target, source in enumerate(streams):
            os.dup2(source, target)
    else:
        for stream in (0, 1, 2):
            os.close(stream)
    for file in streams:
        os.close(file)
    if child:
        os.write(status, b"%d\n" % child)
        os.write(status, b"%d\n" % os.waitpid(child, 0)[1])
        os._exit(0)
    os.close(status)


def carry_out(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Do as ``python WORDS`` would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.path[0] = folder
    option, program, *arguments = words
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        assert option == "-c", option
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    preload()
    carry_out(**serve(socket.socket(fileno=int(sys.argv[1]))))
