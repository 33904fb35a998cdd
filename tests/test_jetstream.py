"""Claims about the JetStream import and the serving path, over a small recurrent engine."""

import asyncio
import itertools
import queue
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from r1jax.core import private_jax
from r1jax.sampler import jetstream, serve

needs_jetstream = pytest.mark.skipif(not jetstream.AVAILABLE, reason="google-jetstream 0.2.2 is not installed")

VOCABULARY = 24
WIDTH = 16
STOP = 3
PAD = 0


class Letters(jetstream.Tokenizer):
    """Token i + 4 is the i-th letter; no bos."""

    def encode(self, s, **kwargs):
        ids = np.array([ord(letter) - ord("a") + 4 for letter in s], np.int32)
        return ids, len(ids)

    def decode(self, token_ids, **kwargs):
        return "".join(chr(int(token) - 4 + ord("a")) for token in token_ids)

    pad_id = PAD
    eos_id = STOP
    bos_id = None
    stop_tokens = frozenset({STOP})


class LettersWithBos(Letters):
    bos_id = 1


@struct.dataclass
class State:
    hidden: jax.Array  # [S, D]
    logits: jax.Array  # [S, V]
    generated: jax.Array  # [S] tokens since the insertion
    active: jax.Array  # [S]


def step(params, hidden, token):
    embed, recurrent, unembed = params
    hidden = jnp.tanh(hidden @ recurrent + embed[token])
    return hidden, hidden @ unembed


@jax.jit
def prefill(params, tokens, true_length):
    def body(carry, position):
        hidden, logits = step(params, carry[0], tokens[position])
        keep = position < true_length
        return (jnp.where(keep, hidden, carry[0]), jnp.where(keep, logits, carry[1])), None

    return jax.lax.scan(body, (jnp.zeros(WIDTH), jnp.zeros(VOCABULARY)), jnp.arange(tokens.shape[0]))[0]


@jax.jit
def insert(prefix, state, slot):
    return State(
        hidden=state.hidden.at[slot].set(prefix[0]),
        logits=state.logits.at[slot].set(prefix[1]),
        generated=state.generated.at[slot].set(0),
        active=state.active.at[slot].set(True),
    )


@jax.jit
def generate(params, state):
    token = jnp.argmax(state.logits, -1).astype(jnp.int32)
    generated = state.generated + state.active
    packed = jnp.stack([token, state.active.astype(jnp.int32), generated], axis=1)
    hidden, logits = step(params, state.hidden, token)
    return State(hidden, logits, generated, state.active & (token != STOP)), packed


class Recurrent(jetstream.Engine):
    """A one-layer recurrent network behind the Engine API; greedy, sample then forward."""

    def __init__(self, slots=4, longest=24, tokenizer=Letters, fail_at=None, slow_s=0.0):
        self.slots, self.longest, self.tokenizer = slots, longest, tokenizer
        self.fail_at, self.slow_s = fail_at, slow_s
        self.calls = 0
        self.padded_lengths = set()

    def prefill(self, *, params, existing_prefix=None, padded_tokens, true_length):
        self.padded_lengths.add(len(padded_tokens))
        return prefill(params, padded_tokens, true_length)

    def insert(self, prefix, decode_state, slot):
        return insert(prefix, decode_state, slot)

    def generate(self, params, decode_state):
        self.calls += 1
        time.sleep(self.slow_s)
        if self.calls == self.fail_at:
            raise FloatingPointError("the device caught fire")
        decode_state, packed = generate(params, decode_state)
        return decode_state, jetstream.ResultTokens(packed, (0, 1), (1, 2), (2, 3), 1)

    def init_decode_state(self):
        slots = self.slots
        return State(
            jnp.zeros((slots, WIDTH)), jnp.zeros((slots, VOCABULARY)), jnp.zeros(slots, int), jnp.zeros(slots, bool)
        )

    def load_params(self, seed=0):
        rng = np.random.default_rng(seed)
        shapes = ((VOCABULARY, WIDTH), (WIDTH, WIDTH), (WIDTH, VOCABULARY))
        return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def get_tokenizer(self):
        return jetstream.TokenizerParameters(path="letters")

    def build_tokenizer(self, metadata):
        return self.tokenizer()

    def get_prefix_destination_sharding(self):
        return None

    @property
    def max_concurrent_decodes(self):
        return self.slots

    @property
    def max_prefill_length(self):
        return self.longest

    samples_per_slot = 1
    mesh = None
    colocated_cpus = None


def greedy(params, prompt, max_new_tokens):
    """Returns the greedy continuation before the stop token, one token at a time, in float64."""
    embed, recurrent, unembed = (np.asarray(array, np.float64) for array in params)
    hidden, continuation = np.zeros(WIDTH), []
    for token in prompt:
        hidden = np.tanh(hidden @ recurrent + embed[token])
    for _ in range(max_new_tokens):
        token = int(np.argmax(hidden @ unembed))
        if token == STOP:
            break
        continuation.append(token)
        hidden = np.tanh(hidden @ recurrent + embed[token])
    return continuation


def random_prompts(count, longest=24, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCABULARY, size=rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@needs_jetstream
def test_forty_prompts_through_the_driver_equal_a_sequential_greedy_loop():
    engine = Recurrent()
    params = engine.load_params()
    prompts = random_prompts(40)
    expected = [greedy(params, prompt, 12) for prompt in prompts]
    assert serve.generate_many(engine, params, prompts, 12, deadline_s=60) == expected
    assert {len(tokens) for tokens in expected} >= {0, 12}  # some stop at once, some use the whole budget
    assert engine.padded_lengths == {16, 24}


@needs_jetstream
def test_a_prefix_that_the_engine_keeps_can_be_inserted_again():
    class Remembering(Recurrent):
        def __init__(self):
            super().__init__(slots=2)
            self.kept = {}

        def prefill(self, *, params, padded_tokens, true_length):
            key = tuple(padded_tokens[:true_length].tolist())
            if key not in self.kept:
                self.kept[key] = super().prefill(params=params, padded_tokens=padded_tokens, true_length=true_length)
            return self.kept[key]

    engine = Remembering()
    params = engine.load_params()
    assert serve.generate_many(engine, params, [[5, 9]] * 6, 5, 30) == [greedy(params, [5, 9], 5)] * 6
    assert len(engine.kept) == 1


@needs_jetstream
@pytest.mark.parametrize("budget", [1, 2, 5])
def test_the_driver_returns_exactly_the_budget(budget):
    engine = Recurrent(slots=2)
    params = engine.load_params(seed=3)
    prompts = [p for p in random_prompts(60, seed=5) if len(greedy(params, p, 5)) == 5][:8]
    assert [len(tokens) for tokens in serve.generate_many(engine, params, prompts, budget, 60)] == [budget] * 8


@needs_jetstream
def test_the_driver_survives_the_last_request_ending_while_it_looks_for_work(monkeypatch):
    orchestrator = jetstream.orchestrator()
    restarts = []
    original = orchestrator.Driver._generate_thread

    class SlowPut(queue.Queue):
        def put(self, item, block=True, timeout=None):
            super().put(item, block, timeout)
            if not block and threading.current_thread().name == "generate-0":
                time.sleep(0.02)  # time for the detokenize thread to end the last request

    def counted(driver, index):
        restarts.append(index)
        return original(driver, index)

    names = types.SimpleNamespace(Queue=SlowPut, Empty=queue.Empty, Full=queue.Full)
    monkeypatch.setattr(orchestrator, "queue", names)
    monkeypatch.setattr(orchestrator.Driver, "_generate_thread", counted)
    engine = Recurrent(slots=3)
    params = engine.load_params()
    with serve.SafeDriver(engine, params) as driver:
        for prompt in random_prompts(6):
            assert driver.generate_many([prompt], 3, 30) == [greedy(params, prompt, 3)]
    assert len(restarts) > 1


@needs_jetstream
def test_an_exception_in_generate_reaches_every_caller():
    engine = Recurrent(fail_at=3)
    with pytest.raises(RuntimeError, match="generate-0 failed: the device caught fire") as caught:
        serve.generate_many(engine, engine.load_params(), random_prompts(8), 12, deadline_s=30)
    assert isinstance(caught.value.__cause__, FloatingPointError)


@needs_jetstream
def test_a_failed_driver_refuses_further_requests():
    engine = Recurrent(fail_at=1)
    with serve.SafeDriver(engine, engine.load_params()) as driver:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="caught fire"):
                driver.generate_many([[5, 6]], 4, 30)
        assert driver.live is False


@needs_jetstream
def test_stop_fails_open_requests_instead_of_leaving_them_waiting():
    engine = Recurrent(slots=2, slow_s=0.02)
    params = engine.load_params(seed=3)
    prompt = next(p for p in random_prompts(60, seed=5) if len(greedy(params, p, 1000)) == 1000)
    driver = serve.SafeDriver(engine, params)
    errors = []

    def call():
        try:
            driver.generate_many([prompt], 100000, 60)
        except RuntimeError as error:
            errors.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(5)]  # more than the slots: some wait in the queue
    for caller in callers:
        caller.start()
    while engine.calls < 3:
        time.sleep(0.01)
    driver.stop(deadline_s=20)
    for caller in callers:
        caller.join(20)
    assert errors == ["serving: the driver was stopped"] * 5
    assert not any(thread.is_alive() for thread in driver._all_threads)


@needs_jetstream
def test_generate_many_names_what_it_waits_for_at_its_deadline():
    engine = Recurrent(slow_s=0.02)
    params = engine.load_params(seed=3)
    prompt = next(p for p in random_prompts(60, seed=5) if len(greedy(params, p, 1000)) == 1000)
    with pytest.raises(TimeoutError, match="2 of 2 prompts were not done after 0.3 s"):
        serve.generate_many(engine, params, [prompt] * 2, 100000, deadline_s=0.3)


@needs_jetstream
def test_slots_of_a_caller_that_gave_up_are_used_again():
    engine = Recurrent(slots=1, slow_s=0.01)
    params = engine.load_params(seed=3)
    prompt = next(p for p in random_prompts(60, seed=5) if len(greedy(params, p, 1000)) == 1000)
    with serve.SafeDriver(engine, params) as driver:
        with pytest.raises(TimeoutError):
            driver.generate_many([prompt], 100000, 0.3)
        assert driver.generate_many([prompt], 4, 30) == [greedy(params, prompt, 4)]


@needs_jetstream
@pytest.mark.parametrize(("prompt", "length"), [([5] * 25, 25), ([], 0), ("a" * 30, 30)])
def test_a_prompt_that_is_too_long_or_empty_is_refused_and_the_driver_goes_on(prompt, length):
    engine = Recurrent()
    params = engine.load_params()
    with serve.SafeDriver(engine, params) as driver:
        request = jetstream.orchestrator().ActiveRequest(max_tokens=3, return_channel=None, prefill_content=prompt)
        with pytest.raises(ValueError, match=f"prompt of {length} tokens must have 1 to 24"):
            driver.place_request_on_prefill_queue(request)
        with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
            driver.generate_many([[5]], 0)
        assert driver.generate_many([[5, 9]], 3, 30) == [greedy(params, [5, 9], 3)]


@needs_jetstream
def test_new_parameters_take_effect_in_a_running_driver_without_a_new_trace():
    engine = Recurrent()
    first, second = engine.load_params(seed=0), engine.load_params(seed=7)
    prompts = random_prompts(8)
    with serve.SafeDriver(engine, first) as driver:
        assert driver.generate_many(prompts, 6, 30) == [greedy(first, prompt, 6) for prompt in prompts]
        traces = private_jax.compilations(generate)
        driver.set_params(second)
        assert driver.generate_many(prompts, 6, 30) == [greedy(second, prompt, 6) for prompt in prompts]
        assert private_jax.compilations(generate) == traces


@pytest.mark.parametrize(
    ("longest", "buckets"), [(16, (16,)), (24, (16, 24)), (64, (16, 32, 64)), (5, (5,)), (100, (16, 32, 64, 100))]
)
def test_prefill_buckets_are_powers_of_two_up_to_the_engines_maximum(longest, buckets):
    assert serve.prefill_buckets(types.SimpleNamespace(max_prefill_length=longest)) == buckets


def test_prefill_buckets_are_the_engines_own_where_it_names_them():
    engine = types.SimpleNamespace(max_prefill_length=40, buckets=(10, 40))
    assert serve.prefill_buckets(engine) == (10, 40)


class Utf8:
    """One token a byte."""

    eos_id, pad_id, bos_id = 3, 0, 1

    def encode(self, text):
        return list(text.encode())

    encode_prompt = encode

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_text_stream_gives_whole_characters_and_nothing_twice():
    stream = serve.TextStream(Utf8().decode)
    ids = Utf8().encode("aé√😀z")
    pieces = [stream.add([token]) for token in ids]
    assert pieces == ["a", "", "é", "", "", "√", "", "", "", "😀", "z"]
    assert stream.add([0xE2]) == ""
    assert stream.add([], last=True) == "\ufffd"


def test_a_text_stream_keeps_the_spaces_that_decoding_puts_between_tokens():
    stream = serve.TextStream(lambda ids: " ".join(str(token) for token in ids))
    assert [stream.add(ids) for ids in ([10], [20, 30], [], [40])] == ["10", " 20 30", "", " 40"]


def test_the_driver_tokenizer_adds_no_bos_and_stops_only_where_it_is_told():
    assert serve.DriverTokenizer(Utf8()).stop_tokens == {3}
    tokenizer = serve.DriverTokenizer(Utf8(), (7, 9))
    assert tokenizer.stop_tokens == {7, 9} and tokenizer.bos_id is None
    ids, length = tokenizer.encode("hi", is_bos=True, jax_padding=False)
    assert ids.tolist() == [104, 105] and length == 2
    with pytest.raises(ValueError, match="needs a tokenizer"):
        serve.DriverTokenizer(None, (7,)).encode("hi")


def decode_request(**content):
    pb2 = jetstream.orchestrator().jetstream_pb2
    return pb2.DecodeRequest(max_tokens=6, **content)


def token_content(ids):
    return jetstream.orchestrator().jetstream_pb2.DecodeRequest.TokenContent(token_ids=ids)


def collect(driver, request):
    async def run():
        servicer = jetstream.orchestrator().LLMOrchestrator(driver)
        return [sample.token_ids[:] async for r in servicer.Decode(request) for sample in r.stream_content.samples]

    return list(itertools.chain.from_iterable(asyncio.run(run())))


@needs_jetstream
@pytest.mark.parametrize(("tokenizer", "bos"), [(Letters, []), (LettersWithBos, [1])])
def test_a_token_prompt_gets_a_bos_only_where_the_tokenizer_has_one(tokenizer, bos):
    engine = Recurrent(tokenizer=tokenizer)
    params = engine.load_params()
    with serve.SafeDriver(engine, params) as driver:
        assert collect(driver, decode_request(token_content=token_content([7, 8]))) == greedy(params, bos + [7, 8], 6)
        exact = decode_request(token_content=token_content([7, 8]), session_cache="yes")
        assert collect(driver, exact) == greedy(params, [7, 8], 6)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@needs_jetstream
def test_the_grpc_server_serves_text_and_tokens_on_loopback():
    orchestrator = jetstream.orchestrator()
    grpc, pb2 = orchestrator.grpc, orchestrator.jetstream_pb2
    port = free_port()
    engine = Recurrent()
    params = engine.load_params(seed=3)
    server = serve.start_server(engine, params, port)
    try:
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 cannot be used"):
            serve.start_server(engine, params, port)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = orchestrator.jetstream_pb2_grpc.OrchestratorStub(channel)
            replies = list(stub.Decode(decode_request(token_content=token_content([7, 8])), timeout=30))
            tokens = [token for reply in replies for token in reply.stream_content.samples[0].token_ids]
            text = pb2.DecodeRequest.TextContent(text="de")  # the same two tokens
            replies = list(stub.Decode(decode_request(text_content=text), timeout=30))
            assert jetstream.server_lib()._HOST == "127.0.0.1"
            letters = "".join(reply.stream_content.samples[0].text for reply in replies)
            with pytest.raises(grpc.RpcError, match="prompt of 25 tokens must have 1 to 24"):
                list(stub.Decode(decode_request(token_content=token_content([5] * 25)), timeout=30))
    finally:
        server.stop()
    assert tokens == greedy(params, [7, 8], 6)
    assert letters == Letters().decode(tokens)


@needs_jetstream
def test_the_slot_of_a_grpc_client_that_went_away_serves_the_next():
    orchestrator = jetstream.orchestrator()
    engine = Recurrent(slots=1, slow_s=0.01)
    params = engine.load_params(seed=3)
    prompt = next(p for p in random_prompts(60, seed=5) if len(greedy(params, p, 1000)) == 1000)
    endless = orchestrator.jetstream_pb2.DecodeRequest(
        max_tokens=1000000, session_cache="exact", token_content=token_content(prompt)
    )
    port = free_port()
    server = serve.start_server(engine, params, port)
    try:
        with orchestrator.grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = orchestrator.jetstream_pb2_grpc.OrchestratorStub(channel)
            first = stub.Decode(endless, timeout=30)
            next(first)
            first.cancel()
            replies = list(stub.Decode(decode_request(token_content=token_content([7, 8])), timeout=30))
    finally:
        server.stop()
    tokens = [token for reply in replies for token in reply.stream_content.samples[0].token_ids]
    assert tokens == greedy(params, [7, 8], 6)


def run_python(program):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = "import sys; sys.modules['jetstream'] = None\n"
RESULT = """
import numpy as np
from r1jax.sampler import jetstream
result = jetstream.ResultTokens(np.arange(20).reshape(4, 5), (0, 2), (2, 4), (4, 5), 2)
slot = result.convert_to_numpy().get_result_at_slot(1)
result.copy_to_host_async()
print([(name, getattr(slot, name).tolist()) for name in ("tokens", "valid", "lengths")])
"""


@needs_jetstream
def test_importing_jetstream_leaves_tensorflow_out_and_logging_as_it_was():
    program = """
import logging, sys
from r1jax.sampler import jetstream, serve
jetstream.server_lib()
serve.SafeDriver
root = logging.getLogger()
print([name for name in ("tensorflow", "seqio", "seqio.vocabularies") if name in sys.modules], root.level,
      root.handlers)
"""
    assert run_python(program) == "[] 30 []\n"


def test_without_jetstream_the_shim_has_types_of_its_own_and_one_line_says_what_is_off():
    program = BLOCKED + (
        "from r1jax.sampler import jetstream, serve\n"
        "names = ('Engine', 'ResultTokens', 'SlotData', 'Tokenizer', 'TokenizerParameters')\n"
        "print(jetstream.AVAILABLE, {getattr(jetstream, name).__module__ for name in names})\n"
        "print(jetstream.notice())\n"
        "try:\n    serve.generate_many(None, None, [[1]], 1)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    lines = run_python(program).splitlines()
    assert lines[0] == "False {'r1jax.sampler.jetstream'}"
    assert len(lines) == 3 and lines[1] == lines[2]
    assert "serving (Driver, gRPC) is off" in lines[1]


@needs_jetstream
def test_result_tokens_without_jetstream_reads_as_jetstreams_own():
    assert run_python(BLOCKED + RESULT) == run_python(RESULT)
    assert "('lengths', [14, 19])" in run_python(RESULT)


@needs_jetstream
def test_a_process_that_never_stops_its_driver_still_ends():
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_jetstream import Recurrent, serve\n"
        "engine = Recurrent(); driver = serve.SafeDriver(engine, engine.load_params())\n"
        "print(len(driver.generate_many([[5, 9]], 1, 30)))\n"
    )
    assert run_python(program) == "1\n"
