"""Jobs without the seconds that imports take: a process that has imported what they need forks; the child is the job.

For tests of what jobs do with files. Those of how a process starts, what it imports, and how it dies start real ones.
The child has the arguments, the folder, the environment and the streams that a new process would have, but for
variables that Python and its libraries read when they start.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import traceback
from pathlib import Path

STREAMS = 4  # training tells the terminal by descriptor 3
IMPORTED = ("diffusers.models.autoencoders.autoencoder_kl", "matplotlib.figure", "pandas", "sklearn.datasets", "timm")
IMPORTED += ("snakemake.cli", "torch._dynamo", "tensorboard.summary.writer.event_file_writer", "haste.cli.main")


class Warm:
    """The process that forks.

    Attributes:
        client: a command that has the words after it, of `snakemake` or `haste`, run as a child of that process.
        environment: with these variables `haste` is such a child in every bash, so in Snakemake's jobs too.
        spared: so is every `haste` but the first of each command, which starts as a user's.
    """

    def __init__(self, folder: Path) -> None:
        at = str(folder / "socket")
        self.client = [sys.executable, "-I", "-S", __file__, at]
        bash, sparing, begun = folder / "bash", folder / "sparing", folder / "begun"
        child = f"""{" ".join(self.client)} haste "$@";"""
        begun.mkdir()
        bash.write_text(f"haste() {{ {child} }}\n")
        first = f"""mkdir "{begun}/$1" 2> /dev/null"""
        sparing.write_text(f"""haste() {{ if {first}; then command haste "$@"; else {child} fi; }}\n""")
        self.environment, self.spared = {"BASH_ENV": str(bash)}, {"BASH_ENV": str(sparing)}
        server = [sys.executable, "-P", __file__, at]
        self.process = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout and self.process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End it. When the tests are killed it ends by itself, as nobody holds its standard input."""
        self.process.kill()  # a process that a test forked may hold that input too
        self.process.communicate()

    def snakemake(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """What Snakemake says and its exit code."""
        command, environment = [*self.client, "snakemake", *map(str, arguments)], {**os.environ, **self.environment}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)


def ask(at: str, *words: str) -> int:
    """Have these words run with the streams of this process; the exit code."""
    asked = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    streams = [number for number in range(STREAMS) if _is_open(number)]
    with socket.socket(socket.AF_UNIX) as to:
        to.connect(at)
        socket.send_fds(to, [json.dumps({**asked, "streams": streams}).encode() + b"\n"], streams)
        return int(to.makefile().readline() or 137)  # silent: it was killed


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def serve(at: str) -> None:
    """Import, and fork for each who asks until standard input is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(at)
        server.listen(64)
        print("ready", flush=True)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if not os.fork():
                server.close()
                os._exit(_become(client))
            client.close()
            with contextlib.suppress(ChildProcessError):  # those that have ended
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _become(client: socket.socket) -> int:
    """Be what a client asks for; the exit code, which the client has by then."""
    text, streams, *_ = socket.recv_fds(client, 1 << 20, STREAMS)
    while not text.endswith(b"\n"):
        text += client.recv(1 << 20)
    asked = json.loads(text)
    for number, stream in zip(asked["streams"], streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    code = _run(*asked["words"])
    client.sendall(f"{code}\n".encode())
    return code


def _run(program: str, *arguments: str) -> int:
    sys.argv = [program, *arguments]
    main = importlib.import_module({"haste": "haste.cli.main", "snakemake": "snakemake.cli"}[program]).main
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(*sys.argv[1:]))
    serve(sys.argv[1])
    os._exit(0)
