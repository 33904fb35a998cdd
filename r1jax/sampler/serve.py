"""Serving an engine through JetStream's own Driver threads and gRPC server.

The rollout sampler does not use this module: JetStream's Driver returns neither log-probs nor stop tokens and takes no
sampling parameters per request. It serves the same engine for manual use and evaluation, one token per device call,
with the engine's default sampling parameters (greedy).
"""

import atexit
import contextlib
import functools
import queue
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from r1jax.sampler import jetstream
from r1jax.sampler.stop_strings import StopStrings

SMALLEST_BUCKET = 16  # tokens; prompts are padded to powers of two from here on, where the engine names no buckets

NO_SLOT_TAKEN = "At this point we must have some requests inserted"  # JetStream 0.2.2's assertion


def prefill_buckets(engine: Any) -> tuple[int, ...]:
    """Returns the padded prompt lengths of `engine`, in tokens, rising; the last is its max_prefill_length.

    They are the engine's attribute `buckets` where it has one, otherwise 16, 32, ... and the maximum.
    """
    longest = engine.max_prefill_length
    named = tuple(getattr(engine, "buckets", ()))
    if not named:
        powers = (SMALLEST_BUCKET << shift for shift in range(longest.bit_length()))
        named = tuple(length for length in powers if length < longest)
    return tuple(sorted({length for length in named if length < longest} | {longest}))


class DriverTokenizer(jetstream.Tokenizer):  # ty: ignore[unsupported-base] JetStream's or, without it, our own base
    """Wraps a tokenizer with encode_prompt(text), decode(ids), eos_id and pad_id in JetStream's interface.

    A text is encoded as the trainer encodes a prompt, so `bos_id` is None and JetStream adds no bos. Decoding ends at
    `stop_ids` (the tokenizer's eos if None). Without a tokenizer only token prompts can be served.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int] | None = None):
        self._tokenizer = tokenizer
        self._stop_ids = {tokenizer.eos_id} if stop_ids is None else set(stop_ids)

    def encode(self, s: str, **kwargs: Any) -> tuple[np.ndarray, int]:
        """Returns (int32 token ids without padding, their number). Raises ValueError without a tokenizer."""
        if self._tokenizer is None:
            raise ValueError("serving: a text prompt needs a tokenizer; build the engine with tokenizer=")
        ids = np.asarray(self._tokenizer.encode_prompt(s), np.int32)
        return ids, len(ids)

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Returns the text of `token_ids`, "" without a tokenizer."""
        return "" if self._tokenizer is None else self._tokenizer.decode(token_ids)

    @property
    def pad_id(self) -> int:
        return 0 if self._tokenizer is None else self._tokenizer.pad_id

    @property
    def eos_id(self) -> int:
        return min(self._stop_ids, default=-1) if self._tokenizer is None else self._tokenizer.eos_id

    @property
    def bos_id(self) -> None:
        return None

    @property
    def stop_tokens(self) -> set[int]:
        return self._stop_ids


class TextStream:
    """Turns the tokens of one response into text as they arrive; tokens of incomplete characters are held back."""

    def __init__(self, decode: Any):
        self._decode = decode
        self._ids: list[int] = []
        # The text of the ids before `_shown` has been returned; decoding starts at `_start`.
        self._start = self._shown = 0

    def add(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Returns the text that `token_ids` complete; with `last`, also the text that was held back."""
        self._ids.extend(token_ids)
        if self._shown == len(self._ids):
            return ""
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not last:
            return ""
        new = text[len(self._decode(self._ids[self._start : self._shown])) :]
        self._start, self._shown = self._shown, len(self._ids)
        return new


class _LatestParams:
    """An engine as the Driver's threads see it: every call uses the newest parameters.

    The Driver's threads take their parameters once, when they start, so they get None instead.
    """

    def __init__(self, engine: Any, params: Any):
        self.engine = engine
        self.params = params

    def prefill(self, *, params: None, **arguments: Any) -> Any:
        return self.engine.prefill(params=self.params, **arguments)

    def generate(self, params: None, decode_state: Any) -> Any:
        return self.engine.generate(self.params, decode_state)

    def build_tokenizer(self, metadata: Any) -> Any:
        if hasattr(self.engine, "stop_ids"):  # r1jax's engine: JetStream must stop where it does, and nowhere else
            return DriverTokenizer(self.engine.tokenizer, self.engine.stop_ids)
        return self.engine.build_tokenizer(metadata)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class _Collector:
    """Gathers the tokens of one request for a caller that waits in a thread."""

    def __init__(self):
        self.token_ids: list[int] = []
        self.error: Exception | None = None
        self.done = threading.Event()
        self._cancelled = False

    def add_result(self, samples: list[Any]) -> None:
        self.token_ids.extend(samples[0].token_ids)

    def set_exception(self, error: Exception) -> None:
        self.error = error
        self.done.set()

    def close(self) -> None:
        self.done.set()

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled


class _Channel:
    """The return channel of one open request; the driver keeps it until it is closed.

    It ends the request at the step of its last token (JetStream takes one step more) or of the end of a stop string,
    frees the slot of a client that has disconnected, and ignores a client whose event loop is closed. Text is returned
    in whole characters, where JetStream decodes token by token.
    """

    def __init__(
        self,
        driver: "SafeDriverMethods",
        request: Any,
        inner: Any,
        text: TextStream | None,
        stops: StopStrings | None = None,
    ):
        self._driver = driver
        self._stops = stops
        self._request = request
        self._inner = inner
        self._text = text
        self._tokens = 0

    def add_result(self, samples: list[Any]) -> None:
        self._tokens += len(samples[0].token_ids)
        stopped = self._stops is not None and self._stops.count(samples[0].token_ids) is not None
        if self._text is not None:
            last = stopped or self._request.complete.all() or self._tokens >= self._request.max_tokens
            samples[0].text = [self._text.add(samples[0].token_ids, last)]
        delivered = self._deliver(self._inner.add_result, samples)
        if stopped or not delivered or self._inner.cancelled() or self._tokens >= self._request.max_tokens:
            self._request.complete[:] = True  # the detokenize thread, which calls this, checks it next

    def set_exception(self, error: Exception) -> None:
        self._driver.forget(self)
        self._deliver(self._inner.set_exception, error)

    def close(self) -> None:
        self._driver.forget(self)
        self._deliver(self._inner.close)

    def _deliver(self, send: Any, *arguments: Any) -> bool:
        try:
            send(*arguments)
        except RuntimeError:  # asyncio: the event loop is closed and nobody reads
            return False
        return True

    def __aiter__(self) -> Any:
        return self._inner.__aiter__()


_RUNNING: "weakref.WeakSet[SafeDriverMethods]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Ends the threads before the interpreter exits: one that returned from a device call later would abort it."""
    for driver in list(_RUNNING):
        driver.stop()


class SafeDriverMethods(jetstream.Driver):
    """The changes that `SafeDriver` makes to JetStream 0.2.2's Driver.

    * An exception in a thread reaches every open request; the process continues.
    * stop() fails open requests instead of leaving them waiting, and has a deadline.
    * A prompt that is empty or longer than the engine's max_prefill_length is refused with ValueError.
    * Token prompts are used unchanged when the tokenizer has no bos or the request has a session_cache.
    * max_prefill_length may be any length.
    * The parameters can be replaced while it runs.
    * A process that exits without stop() stops it first.
    """

    def __init__(self, engine: Any, params: Any, metrics_collector: Any = None):
        self._lock = threading.Lock()
        self._open: set[_Channel] = set()
        self._closed: Exception | None = None
        self._buckets = prefill_buckets(engine)
        self._engine: Any = _LatestParams(engine, params)
        self._tokenizer = self._engine.build_tokenizer(engine.get_tokenizer())
        super().__init__(
            prefill_engines=[self._engine],
            generate_engines=[self._engine],
            prefill_params=[None],
            generate_params=[None],
            interleaved_mode=True,
            metrics_collector=metrics_collector,
        )
        _RUNNING.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def set_params(self, params: Any) -> None:
        """Uses `params` from the next device call on, also for requests in flight, which keep their cache."""
        self._engine.params = params

    def generate_many(
        self, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int, deadline_s: float = 600.0
    ) -> list[list[int]]:
        """Returns the continuation of each prompt, all decoded concurrently, in the order of the prompts.

        Prompts are used unchanged (no bos is added). A continuation has at most `max_new_tokens` tokens, fewer where
        the engine's limit is lower, and ends before the stop token, which is not returned. ValueError: a prompt that
        is empty or too long, or max_new_tokens below 1. RuntimeError: an engine call failed (its exception is the
        cause), or the driver was stopped. TimeoutError: not all were done in `deadline_s`.
        """
        for prompt in prompts_ids:
            self._checked(np.asarray(prompt, np.int32), len(prompt))
        collectors = [_Collector() for _ in prompts_ids]
        deadline = time.monotonic() + deadline_s
        try:
            for prompt, collector in zip(prompts_ids, collectors, strict=True):
                self.place_request_on_prefill_queue(_token_request(prompt, max_new_tokens, collector))
            for collector in collectors:
                if not collector.done.wait(max(0.0, deadline - time.monotonic())):
                    waiting = sum(not other.done.is_set() for other in collectors)
                    raise TimeoutError(
                        f"generate_many: {waiting} of {len(collectors)} prompts were not done after {deadline_s} s"
                    )
                if collector.error is not None:
                    raise RuntimeError(str(collector.error)) from (collector.error.__cause__ or collector.error)
        finally:
            for collector in collectors:
                collector.cancel()
        return [collector.token_ids for collector in collectors]

    def place_request_on_prefill_queue(self, request: Any) -> None:
        """Queues `request`. Raises ValueError for a bad request, RuntimeError after the driver failed or stopped."""
        if request.max_tokens < 1:
            raise ValueError(f"serving: max_tokens={request.max_tokens} must be at least 1")
        request.prefill_content = self._token_ids(request.prefill_content, with_bos=not request.history_path)
        text = None if request.is_client_side_tokenization else TextStream(self._tokenizer.decode)
        channel = _Channel(self, request, request.return_channel, text, self._stop_strings())
        with self._lock:
            if self._closed is not None:
                raise RuntimeError(str(self._closed)) from self._closed.__cause__
            request.return_channel = channel
            self._open.add(channel)
            self._prefill_backlog.put(request, block=False)

    def _stop_strings(self) -> StopStrings | None:
        """Returns a follower of config.sampler.stop_strings, None without any or for an engine that is not r1jax's."""
        texts = getattr(getattr(self._engine, "sampler", None), "stop_strings", ())
        return StopStrings(self._tokenizer.decode, texts) if texts else None

    def forget(self, channel: _Channel) -> None:
        """Removes a request that has ended from the open ones."""
        with self._lock:
            self._open.discard(channel)

    def stop(self, deadline_s: float = 60.0) -> None:
        """Fails the open requests and ends the threads. Raises TimeoutError for threads that outlast `deadline_s`."""
        self._close(RuntimeError("serving: the driver was stopped"))
        queues: list[Any] = [
            self._prefill_backlog,
            *self._transfer_backlogs,
            *self._generate_backlogs.values(),
            *self._detokenize_backlogs,
        ]
        deadline = time.monotonic() + deadline_s
        while alive := [thread.name for thread in self._all_threads if thread.is_alive()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"serving: {', '.join(alive)} did not end within {deadline_s} s")
            for waiting in queues:  # some threads are blocked on a full queue,
                _empty(waiting)
            time.sleep(0.005)
            for waiting in queues:  # others on an empty one; None ends a thread
                with contextlib.suppress(queue.Full):
                    waiting.put_nowait(None)
            time.sleep(0.005)
        _RUNNING.discard(self)

    def _close(self, error: Exception) -> None:
        with self._lock:
            self._closed = self._closed or error
            channels = list(self._open)
        self.live = False
        for channel in channels:
            channel.set_exception(self._closed)

    def _run(self, thread: Any, index: int) -> None:
        try:
            thread(index)
        except Exception as error:  # any error must reach the open requests
            failure = RuntimeError(f"serving: {threading.current_thread().name} failed: {error}")
            failure.__cause__ = error
            self._close(failure)

    def _prefill_thread(self, idx: int) -> None:
        self._run(super()._prefill_thread, idx)

    def _transfer_thread(self, idx: int) -> None:
        self._run(super()._transfer_thread, idx)

    def _generate_thread(self, idx: int) -> None:
        self._run(self._generate_until_stopped, idx)

    def _generate_until_stopped(self, idx: int) -> None:
        """Restarts the thread when the last request ends just before JetStream's assertion that a slot is taken."""
        while self.live:
            try:
                return super()._generate_thread(idx)
            except AssertionError as error:
                if not str(error).startswith(NO_SLOT_TAKEN):
                    raise

    def _detokenize_thread(self, idx: int) -> None:
        self._run(super()._detokenize_thread, idx)

    def _token_ids(self, content: str | Sequence[int], with_bos: bool) -> np.ndarray:
        """Returns the prompt's token ids, int32 [length]; tokenized here so that a bad prompt fails in its caller."""
        if isinstance(content, str):
            tokens, length = self._tokenizer.encode(content, is_bos=with_bos, jax_padding=False)
            return self._checked(np.asarray(tokens, np.int32)[:length], int(length))
        ids = np.asarray(content, np.int32)
        if with_bos and self._tokenizer.bos_id is not None:
            ids = np.concatenate([np.asarray([self._tokenizer.bos_id], np.int32), ids])
        return self._checked(ids, len(ids))

    def _checked(self, ids: np.ndarray, length: int) -> np.ndarray:
        if not 0 < length <= self._buckets[-1]:
            raise ValueError(f"serving: a prompt of {length} tokens must have 1 to {self._buckets[-1]} tokens")
        return ids

    def _process_prefill_content(
        self, request: Any, tokenizer: Any, is_bos: bool, max_prefill_length: int
    ) -> tuple[np.ndarray, int]:
        ids = request.prefill_content
        bucket = next(length for length in self._buckets if length >= len(ids))
        return np.pad(ids, (0, bucket - len(ids))), len(ids)


def _empty(waiting: queue.Queue) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()


def _token_request(prompt_ids: Sequence[int], max_new_tokens: int, channel: Any) -> Any:
    return jetstream.orchestrator().ActiveRequest(
        max_tokens=max_new_tokens,
        return_channel=channel,
        history_path="exact token ids",  # JetStream's sign that the prompt continues a sequence: no bos
        prefill_content=list(prompt_ids),
        is_client_side_tokenization=True,
    )


@functools.cache
def safe_driver_class() -> type:
    """Returns `SafeDriver(engine, params, metrics_collector=None)`: JetStream's Driver with `SafeDriverMethods`.

    Its threads run until stop(); it is a context manager that stops. ValueError where JetStream is not installed.
    """
    return type("SafeDriver", (SafeDriverMethods, jetstream.orchestrator().Driver), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    if name == "SafeDriver":
        return safe_driver_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


def generate_many(
    engine: Any, params: Any, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int, deadline_s: float = 600.0
) -> list[list[int]]:
    """Returns each prompt's continuation by `engine`, decoded concurrently by JetStream's Driver threads.

    The stop token is not returned. Errors are those of `SafeDriverMethods.generate_many`, and ValueError where
    JetStream is not installed.
    """
    with safe_driver_class()(engine, params) as driver:
        return driver.generate_many(prompts_ids, max_new_tokens, deadline_s)


def start_server(engine: Any, params: Any, port: int, threads: int = 64) -> Any:
    """Returns JetStream's gRPC server for `engine`, listening on 127.0.0.1:`port` without authentication.

    Its stop() also stops the driver. ValueError: the port is taken, or JetStream is not installed.
    """
    library = jetstream.server_lib()
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"start_server: port {port} of 127.0.0.1 cannot be used ({error.strerror})") from error
    credentials = jetstream.orchestrator().grpc.insecure_server_credentials()
    server = library.JetStreamServer(safe_driver_class()(engine, params), threads, port, credentials)
    server.start()
    return server
