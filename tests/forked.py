"""`graft` for the blocks of the docs: one process imports what commands need, and forks for each of them.

A command is still a process of its own, with its own arguments, folder, environment, streams and exit code. What it
need not do again is the import of torch and transformers, which takes longer than most commands.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
socket.send_fds(line, [b"1"], [0, 1, 2])
line.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
line.shutdown(socket.SHUT_WR)
sys.exit(int(line.recv(8)))
"""


@contextlib.contextmanager
def forked_graft() -> Iterator[str]:
    """A folder with a `graft` that the forking process answers, as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        program, address = Path(folder) / "graft", f"{folder}/line"
        program.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
        program.chmod(stat.S_IRWXU)
        paths = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, address]
        env = os.environ | {"PYTHONPATH": paths}
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdin is not None and server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield folder
            server.stdin.close()  # it ends


def serve(address: str) -> None:
    """Answer each caller with the exit code of its command; returns in the process that is to run one."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            sys.exit()
        line = listener.accept()[0]
        if os.fork():  # the child waits for the command, the parent for the next caller
            line.close()
            continue
        listener.close()
        answer(line)
        return


def answer(line: socket.socket) -> None:
    """Fork the command, in which this returns, and send its exit code."""
    streams = socket.recv_fds(line, 1, 3)[1]
    with line.makefile("rb") as said:
        arguments, folder, environment = json.load(said)
    command = os.fork()
    if command:
        code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        line.sendall(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    line.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["graft", *arguments]


def main() -> None:
    # No more than imports: what runs in torch's threads would not be there after a fork.
    import datasets  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401

    import graft.convert
    import graft.evaluate
    import graft.train.run  # noqa: F401
    from graft import cli

    gc.freeze()  # what is imported is not looked through again in each command
    serve(sys.argv[1])
    cli.main()


if __name__ == "__main__":
    main()
