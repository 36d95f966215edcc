"""The real `densityrl annotate` in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

STARTING_SECONDS = 120


class Server:
    def __init__(self, process, address):
        self.process = process
        self.address = address  # http://127.0.0.1:PORT/TOKEN/

    @property
    def origin(self):
        return "/".join(self.address.split("/")[:3])

    def kill(self):
        """As kill -9: nothing is told to the process."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serving(generator, database, *options):
    """Yields a Server that answers; it is interrupted at the end, unless it was killed before."""
    command = [sys.executable, "-m", "densityrl.cli", "annotate", "--no-browser"]
    command += ["--generator", str(generator), "--db", str(database), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        watchdog = threading.Timer(STARTING_SECONDS, process.kill)
        watchdog.start()
        try:
            printed = ""
            while (match := re.search(r"open (http\S+)", printed)) is None:
                line = process.stdout.readline()
                printed += line
                if not line:
                    pytest.fail(f"the server ended: {printed}")
            watchdog.cancel()
            yield Server(process, match[1])
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
