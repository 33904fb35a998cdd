"""The synchronous rollout scheduler: one prefill per prompt, copied into slots; freed slots are refilled at once."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from r1jax.sampler.engine import MAX_STOP_TOKENS, RUNNING, Engine, Prefix, SlotParams, StepOutput
from r1jax.sampler.sample import FINISH_REASONS, RolloutRequest, RolloutSample
from r1jax.sampler.stop_strings import StopStrings


@dataclass
class Statistics:
    """Counts of the last call of `generate` or `stream`."""

    prefills: int = 0
    dispatches: int = 0
    tokens: int = 0
    steps_times_slots: int = 0

    @property
    def occupancy(self) -> float:
        """Returns the share of slot steps that emitted a token."""
        return self.tokens / max(self.steps_times_slots, 1)


@dataclass
class _Group:
    """A prefilled prompt, and its samples that still wait for a slot."""

    request: RolloutRequest
    prefix: Prefix
    experts: np.ndarray | None
    waiting: deque[int]


@dataclass
class _Running:
    """A sample in a slot and its output so far."""

    group: _Group
    index: int
    tokens: list[np.ndarray] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)
    behaviour: list[np.ndarray] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    emitted: int = 0
    stops: StopStrings | None = None  # for config.sampler.stop_strings
    stopped: bool = False  # whether one of them ended it


class RolloutSampler:
    """Drives an engine through prefill, insert and decode, without threads; exceptions reach the caller.

    Its decisions depend only on the requests and on outputs that every process of a run receives, never on time, so all
    processes fill the same slots. Only `stalled(waited_s)` uses a clock, and it can only end the run.
    """

    def __init__(
        self,
        engine: Engine,
        steps_per_dispatch: int | None = None,
        stalled: Callable[[float], bool] | None = None,
    ):
        """`stalled` returns whether a dispatch takes too long, by default longer than config.sampler.stall_deadline_s.

        Raises ValueError for config.sampler.stop_strings where the engine has no tokenizer.
        """
        if engine.sampler.stop_strings and engine.tokenizer is None:
            raise ValueError("config.sampler.stop_strings need a tokenizer: build the engine with tokenizer=")
        self.engine = engine
        self.steps = steps_per_dispatch or engine.sampler.steps_per_dispatch
        self.deadline_s = engine.sampler.stall_deadline_s
        self.cancelled = threading.Event()  # set from another thread: the run ends before its next dispatch
        self.between_dispatches: Callable[[], None] = lambda: None  # may raise, which ends the run there
        self._stalled = stalled or (lambda waited_s: waited_s > self.deadline_s)
        self.statistics = Statistics()
        self._state = None

    def warm_up(self, params: Any) -> None:
        """Compiles every program of the rollout path: prefill for each bucket, insert, and decode for each window."""
        engine = self.engine
        state = engine.init_decode_state()
        for bucket in reversed(engine.buckets):
            prefix = engine.prefill(params=params, padded_tokens=np.zeros(bucket, np.int32), true_length=1)
            state = engine.bulk_insert(prefix, state, [0])
        for window in reversed(engine.windows):
            state, _ = engine.decode(params, engine.release(state, [0]), self.steps, window)
        self._state = state

    def drop_slots(self) -> None:
        """Frees the memory of the slots until the next call, which makes them anew."""
        self._state = None

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: Any,
        version: int = 0,
        on_request: Callable[[list[RolloutSample]], None] = lambda samples: None,
    ) -> list[RolloutSample]:
        """Returns the samples of all requests, in order of request and sample. Raises ValueError for a bad request.

        `on_request` is called with the samples of a request when the last of them is done, before other requests are.
        """
        done: dict[int, list[RolloutSample]] = {id(request): [] for request in requests}
        for request, sample in self._run(requests, params, version):
            samples = done[id(request)]
            samples.append(sample)
            if len(samples) == len(request.keys):
                samples.sort(key=lambda sample: sample.sample_index)
                on_request(samples)
        return [sample for request in requests for sample in done[id(request)]]

    def stream(self, requests: Sequence[RolloutRequest], params: Any, version: int = 0) -> Iterator[RolloutSample]:
        """Yields samples as they finish."""
        for _, sample in self._run(requests, params, version):
            yield sample

    def _run(self, requests, params, version) -> Iterator[tuple[RolloutRequest, RolloutSample]]:
        for request in requests:
            self._check(request)
        self.statistics = Statistics()
        # Every call donates the state, so it is kept only after a run that raised nothing.
        state, self._state = self._state, None
        if state is None:
            state = self.engine.init_decode_state()
        queue = deque(requests)
        free = list(range(self.engine.max_concurrent_decodes))
        running: dict[int, _Running] = {}
        group: _Group | None = None
        while queue or group or running:
            if self.cancelled.is_set():
                raise RuntimeError("the rollout was cancelled")
            self.between_dispatches()
            while free and (group or queue):
                if group is None:
                    group = self._prefill(queue.popleft(), params)
                taken = [group.waiting.popleft() for _ in range(min(len(free), len(group.waiting)))]
                slots = [free.pop(0) for _ in taken]
                state = self.engine.bulk_insert(
                    group.prefix, state, slots, slot_params=self._slot_params(group.request, taken)
                )
                started = (_Running(group, index, stops=self._stop_strings()) for index in taken)
                running |= dict(zip(slots, started, strict=True))
                if not group.waiting:
                    group = None
            longest = max(len(r.group.request.prompt_ids) + r.emitted for r in running.values())
            window = self.engine.window_for(longest + self.steps)
            state, out = self.engine.decode(params, state, self.steps, window)
            out = self._fetch(out, running)
            self.statistics.dispatches += 1
            self.statistics.steps_times_slots += int(out.valid.any(axis=0).sum()) * len(out.status)
            done = self._collect(out, running)
            if cut := [slot for slot in done if out.status[slot] == RUNNING]:  # the device would go on decoding them
                state = self.engine.release(state, cut)
            for slot in done:
                finished = running.pop(slot)
                free.append(slot)
                reason = "stop" if finished.stopped else FINISH_REASONS[int(out.status[slot])]
                yield finished.group.request, _sample(finished, reason, version)
            free.sort()
        self._state = state

    def _check(self, request: RolloutRequest) -> None:
        self.engine.bucket_for(len(request.prompt_ids))
        sampling, rows = request.sampling, self.engine.rows
        if len(request.prompt_ids) + 1 > rows:
            raise ValueError(
                f"request {request.request_id}: {len(request.prompt_ids)} prompt tokens fill the {rows} cache rows"
            )
        self.engine.all_stops(sampling.stop_ids)
        if len(request.keys) == 0:
            raise ValueError(f"request {request.request_id}: no keys, so no samples are requested")

    def _prefill(self, request: RolloutRequest, params) -> _Group:
        length = len(request.prompt_ids)
        padded = np.zeros(self.engine.bucket_for(length), np.int32)
        padded[:length] = request.prompt_ids
        prefix = self.engine.prefill(params=params, padded_tokens=padded, true_length=length)
        self.statistics.prefills += 1
        experts = None
        if self.engine.record_experts and prefix.experts is not None:
            experts = np.asarray(prefix.experts)[0, :length]
        return _Group(request, prefix, experts, deque(range(len(request.keys))))

    def _slot_params(self, request: RolloutRequest, indices: list[int]) -> SlotParams:
        sampling, count = request.sampling, len(indices)
        stop, stop_ids = np.full((count, MAX_STOP_TOKENS), -1, np.int32), self.engine.all_stops(sampling.stop_ids)
        stop[:, : len(stop_ids)] = stop_ids
        return SlotParams(
            temperature=np.full(count, sampling.temperature, np.float32),
            top_p=np.full(count, sampling.top_p, np.float32),
            top_k=np.full(count, sampling.top_k, np.int32),
            max_new_tokens=np.full(count, sampling.max_new_tokens, np.int32),
            key=np.asarray(request.keys[indices], np.uint32),
            stop_ids=stop,
        )

    def _stop_strings(self) -> StopStrings | None:
        texts = self.engine.sampler.stop_strings
        return StopStrings(self.engine.tokenizer.decode, texts) if texts else None

    def _fetch(self, out: StepOutput, running: dict[int, _Running]) -> StepOutput:
        """Returns the output on the host. Raises TimeoutError when the device does not finish before the deadline."""
        started = time.monotonic()
        pause = 1e-4
        while not out.status.is_ready():  # ty: ignore[missing-attribute] JAX's stub lacks it
            if self._stalled(time.monotonic() - started):
                ids = sorted({r.group.request.request_id for r in running.values()})[:8]
                raise TimeoutError(f"decode made no progress for {self.deadline_s:.0f} s; requests in flight: {ids}")
            time.sleep(pause)
            pause = min(pause * 1.5, 2e-3)
        return jax.device_get(out)

    def _collect(self, out: StepOutput, running: dict[int, _Running]) -> list[int]:
        """Appends the output of each slot to its sample and returns the slots that are done.

        Tokens after the end of a stop string are dropped, as if they had never been drawn.
        """
        finished, emitted = [], 0
        for slot, sample in running.items():
            valid = out.valid[slot]
            count = int(valid.sum())
            if sample.stops is not None and (kept := sample.stops.count(out.tokens[slot][:count])) is not None:
                count, sample.stopped = kept, True
            emitted += count
            sample.emitted += count
            sample.tokens.append(np.asarray(out.tokens[slot][:count]))
            sample.logps.append(np.asarray(out.logp[slot][:count]))
            sample.behaviour.append(np.asarray(out.behaviour_logp[slot][:count]))
            if out.experts is not None:
                sample.experts.append(np.asarray(out.experts[slot][:count]))
            if sample.stopped or out.status[slot] != RUNNING:
                finished.append(slot)
        if not emitted:
            raise RuntimeError(f"decode emitted nothing for {len(running)} running slots")
        self.statistics.tokens += emitted
        return finished


def _sample(running: _Running, reason: str, version: int) -> RolloutSample:
    request = running.group.request
    experts = None
    if running.experts and running.group.experts is not None:
        experts = np.concatenate([running.group.experts, *running.experts])
    return RolloutSample(
        request_id=request.request_id,
        sample_index=running.index,
        prompt_ids=np.asarray(request.prompt_ids, np.int32),
        token_ids=np.concatenate(running.tokens).astype(np.int32),
        logps=np.concatenate(running.logps),
        behaviour_logps=np.concatenate(running.behaviour),
        finish_reason=reason,
        weight_version=version,
        routed_experts=experts,
    )
