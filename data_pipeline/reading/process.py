"""Runs `Decoding` in a separate process, so that neither its Python code nor its memory traffic slows down training.

The child runs this module. It receives its `Work` over a socket and sends back micro-batches, log records and, at the
end, the error that stopped it. Arrays travel outside the pickle, without a copy. If either side dies, the other sees
the socket close.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from data_pipeline.common import python
from data_pipeline.common.errors import CascadeError
from data_pipeline.reading.micro_batches import Decoding, MicroBatch, Work
from data_pipeline.storage.retry import get_unless_asked

HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals blocked in the child: they are meant for the trainer, which may still need data before it stops."""
CLOSE_S = 2.0


def pickled(value: Any) -> list[memoryview]:
    """Return the pickle of an object, followed by its arrays, which are not copied."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return [memoryview(head), *(buffer.raw() for buffer in buffers)]


class Wire:
    """Sends and receives Python objects over a socket. Any thread may send; only one may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._lock = end, threading.Lock()

    def send(self, value: Any) -> None:
        """Send one object, its arrays without a copy."""
        self.send_parts(pickled(value))

    def send_parts(self, parts: list[memoryview]) -> None:
        """Send one object that has been `pickled`."""
        with self._lock:
            self._end.sendall(struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)))
            for part in parts:
                self._end.sendall(part)

    def receive(self) -> Any:
        """Receive the next object; its arrays are writable.

        Raises:
            EOFError: the other side is gone.
        """
        (count,) = struct.unpack("<Q", self._exactly(8))
        head, *buffers = [self._exactly(size) for size in struct.unpack(f"<{count}Q", self._exactly(8 * count))]
        return pickle.loads(head, buffers=buffers)

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            with suppress(ConnectionError):
                count = self._end.recv_into(view, 0, socket.MSG_WAITALL)
                if count:
                    view = view[count:]
                    continue
            raise EOFError
        return data

    def close(self) -> None:
        """Shut the connection down, which wakes waiting threads on both sides."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)


class DecodingProcess:
    """An endless iterator over the same `MicroBatch`es as `Decoding(work)`, decoded in a child process.

    `next` raises what `Decoding` raises, and `CascadeError` if the child died.
    """

    def __init__(self, work: Work) -> None:
        parts = pickled(work)  # not in the thread: from here on the trainer may change what its data set caches
        ours, theirs = socket.socketpair()
        self._rank, self._wire, self._closed = work.rank, Wire(ours), False
        environ = dict(
            os.environ,
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",  # of torch, which is imported to resize: data.threads threads do that in parallel
            PYTHONPATH=os.pathsep.join(p for p in sys.path if p),
        )
        command = [*python.module("data_pipeline.reading.process"), str(theirs.fileno())]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # the child inherits the mask
        try:
            self._process = subprocess.Popen(command, env=environ, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._received: queue.Queue[MicroBatch | BaseException] = queue.Queue(-(-work.share // work.micro_batch))
        threading.Thread(target=self._receive, args=(parts,), name="loader", daemon=True).start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        found = get_unless_asked(self._received)
        if isinstance(found, BaseException):
            raise found
        return found

    def _receive(self, work: list[memoryview]) -> None:
        try:
            self._wire.send_parts(work)
            while not self._closed:
                value = self._wire.receive()
                if isinstance(value, logging.LogRecord):
                    logger = logging.getLogger(value.name)
                    if logger.isEnabledFor(value.levelno):
                        logger.handle(value)
                    continue
                self._offer(value)
        except (EOFError, OSError):
            if not self._closed:
                self._offer(CascadeError(self._last_words()))
        except Exception as error:  # a bug, which must end the training rather than let it wait
            self._offer(error)

    def _offer(self, value: MicroBatch | BaseException) -> None:
        while not self._closed:
            with suppress(queue.Full):
                return self._received.put(value, timeout=0.5)

    def _last_words(self) -> str:
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        return (
            f"rank {self._rank}: the process that reads and decodes its data {how}. If the machine ran out of memory, "
            "lower data.prefetch_mb or data.threads; if a decoder crashed, its stack is in the output above. The same "
            "command resumes from the last checkpoint"
        )

    def close(self) -> None:
        """Stop the process and discard what it decoded ahead."""
        self._closed = True
        self._wire.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Forward(logging.handlers.QueueHandler):
    """Sends log records to the training process, which has the log's handlers."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(queue.SimpleQueue())
        self._wire = wire

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._wire.send(record)


def _end_with_trainer(wire: Wire) -> None:
    with suppress(EOFError):
        wire.receive()  # it sends no more
    os._exit(0)


def main(descriptor: int) -> None:
    """Run the child: decode until the trainer is gone.

    Args:
        descriptor: file descriptor of the child's end of the socket.
    """
    import faulthandler

    faulthandler.enable()
    wire = Wire(socket.socket(fileno=descriptor))
    work = wire.receive()
    threading.Thread(target=_end_with_trainer, args=(wire,), daemon=True).start()
    logging.basicConfig(level=logging.INFO, handlers=[_Forward(wire)])
    with suppress(ConnectionError):
        try:
            for batch in Decoding(work):
                wire.send(batch)
        except Exception as error:
            wire.send(_portable(error))
    threading.Event().wait()  # the trainer still has to read this; it ends the process


def _portable(error: BaseException) -> BaseException:
    """Return an error that can be pickled, with its traceback as a note unless it is one of ours."""
    if isinstance(error, CascadeError):
        return error
    error.add_note("in the decoding process:\n" + traceback.format_exc())
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())


if __name__ == "__main__":
    main(int(sys.argv[1]))
