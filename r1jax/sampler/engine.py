"""The rollout engine: JetStream's Engine API over our decoder. It runs programs on the device and schedules nothing.

A step samples from the logits of the last position, emits the token, checks for a stop on the device and then runs the
token through the decoder. So the first token needs no special case, and the samples of one prompt differ from token 0
on although they share its prefill. Random draws are keyed by the slot's key and the position, so that tokens do not
depend on slot, batch, steps per dispatch or order.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from r1jax.core import private_jax, rng, sharding, tree
from r1jax.core.sharding import use_mesh
from r1jax.models import decoder
from r1jax.models.cache import Cache, CacheSpec
from r1jax.sampler import jetstream
from r1jax.schema import Network, SamplerConfig

RUNNING, STOPPED, LENGTH, CAPACITY = range(4)  # why a slot is or is no longer decoding
MAX_STOP_TOKENS = 16


@struct.dataclass
class SlotParams:
    """Sampling parameters of each slot, arrays of [S]."""

    temperature: Any  # float32; 0 is greedy
    top_p: Any  # float32; 1 is off
    top_k: Any  # int32; 0 is off
    max_new_tokens: Any  # int32
    key: Any  # uint32 [S, 2]; the position is folded in
    stop_ids: Any  # int32 [S, MAX_STOP_TOKENS], padded with -1


@struct.dataclass
class DecodeState:
    """Everything that a decode step changes; it is donated to the step."""

    cache: Cache
    logits: jax.Array  # float32 [S, V] of the last position
    length: jax.Array  # int32 [S] rows in the cache
    generated: jax.Array  # int32 [S] tokens emitted
    status: jax.Array  # int32 [S]
    slots: SlotParams


@struct.dataclass
class Prefix:
    """A prefilled prompt: its cache rows, the logits after it, its length and the experts of its tokens."""

    cache: Cache  # [L, 1, T + 1, ...]
    logits: jax.Array  # float32 [V]
    length: jax.Array  # int32 []
    experts: jax.Array | None  # int16 [1, T, Lm, k]


@struct.dataclass
class StepOutput:
    """Output of K steps, arrays of [S, K]; entries of a slot after it stopped are not valid."""

    tokens: jax.Array
    valid: jax.Array
    logp: jax.Array  # of softmax(logits), before temperature and filters
    behaviour_logp: jax.Array  # of the distribution that the token was drawn from
    status: jax.Array  # int32 [S] after the last step
    experts: jax.Array | None  # int16 [S, K, Lm, k] chosen for the emitted token


def filtered(scores_SV: jax.Array, top_p_S: jax.Array, top_k_S: jax.Array) -> jax.Array:
    """Returns scores with all but the k best, and of these all but the nucleus, set to -inf; the best is always kept.

    top_p = 1 is a case of its own and drops nothing: the rounded running sum may reach 1 before the last token.
    """
    order = jnp.argsort(-scores_SV, axis=-1)
    k = jnp.where(top_k_S > 0, top_k_S, scores_SV.shape[-1])
    best = jnp.arange(scores_SV.shape[-1]) < k[:, None]
    ranked = jnp.where(best, jnp.take_along_axis(scores_SV, order, axis=-1), -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    nucleus = (jnp.cumsum(probs, axis=-1) - probs < top_p_S[:, None]) | (top_p_S[:, None] >= 1)
    keep = (best & nucleus).at[:, 0].set(True)
    return jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), scores_SV, -jnp.inf)


@jax.named_scope("sample")
def sample(logits_SV: jax.Array, slots: SlotParams, position_S: jax.Array):
    """Returns (token, raw log-prob, behaviour log-prob), each [S], by the Gumbel-max trick; greedy at temperature 0."""
    greedy = slots.temperature <= 0
    scores = logits_SV / jnp.where(greedy, 1.0, slots.temperature)[:, None]
    any_filter = jnp.any(((slots.top_p < 1) | (slots.top_k > 0)) & ~greedy)
    scores = jax.lax.cond(any_filter, filtered, lambda s, p, k: s, scores, slots.top_p, slots.top_k)
    keys = rng.at_position(slots.key, position_S)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (logits_SV.shape[-1],)))(keys)
    token = jnp.argmax(jnp.where(greedy[:, None], scores, scores + noise), axis=-1).astype(jnp.int32)

    def logprob(x):
        return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(x, axis=-1)

    return token, logprob(logits_SV), jnp.where(greedy, 0.0, logprob(scores))


def _step(params, state: DecodeState, network: Network, window: int):
    """Returns (state, StepOutput) of one step; idle slots are computed but do not change."""
    active = state.status == RUNNING
    token, logp, behaviour = sample(state.logits, state.slots, state.generated)
    generated = state.generated + active
    stopped = jnp.any(token[:, None] == state.slots.stop_ids, axis=-1)
    status = jnp.where(generated >= state.slots.max_new_tokens, LENGTH, RUNNING)
    status = jnp.where((status == RUNNING) & (state.length + 1 >= state.cache.rows), CAPACITY, status)
    status = jnp.where(stopped, STOPPED, status)
    status = jnp.where(active, status, state.status)
    hidden, cache, auxiliary = decoder.forward(
        params, token[:, None], state.length[:, None], active[:, None].astype(jnp.int32), network, state.cache, window
    )
    logits = decoder.logits(params, hidden[:, 0], network.compute.vocab_used)
    logits = jnp.where(active[:, None], logits, state.logits)
    experts = None if auxiliary.experts is None else auxiliary.experts[:, :, 0].swapaxes(0, 1).astype(jnp.int16)
    state = dataclasses.replace(
        state, cache=cache, logits=logits, length=state.length + active, generated=generated, status=status
    )
    return state, StepOutput(token, active, logp, behaviour, status, experts)


@jax.named_scope("decode")
def _decode(params, state: DecodeState, network: Network, steps: int, window: int, record_experts: bool):
    """Returns (state, StepOutput) after up to `steps` steps; ends early when no slot is running."""
    slots = state.length.shape[0]
    shape = (slots, steps)
    experts = None
    if record_experts and network.model.num_moe_layers:
        experts = jnp.zeros((*shape, network.model.num_moe_layers, network.model.num_experts_per_tok), jnp.int16)
    zeros = functools.partial(jnp.zeros, shape)
    out = StepOutput(zeros(jnp.int32), zeros(bool), zeros(jnp.float32), zeros(jnp.float32), state.status, experts)

    def more(carry):
        index, state, _ = carry
        return (index < steps) & jnp.any(state.status == RUNNING)

    def body(carry):
        index, state, out = carry
        state, new = _step(params, state, network, window)
        out = StepOutput(
            tokens=out.tokens.at[:, index].set(new.tokens),
            valid=out.valid.at[:, index].set(new.valid),
            logp=out.logp.at[:, index].set(new.logp),
            behaviour_logp=out.behaviour_logp.at[:, index].set(new.behaviour_logp),
            status=new.status,
            experts=None if experts is None else out.experts.at[:, index].set(new.experts),
        )
        return index + 1, state, out

    _, state, out = jax.lax.while_loop(more, body, (0, state, out))
    return state, out


@jax.named_scope("prefill")
def _prefill(params, tokens, length, network: Network, dtype, existing: Prefix | None) -> Prefix:
    """Returns the prefix of one padded prompt [Tb], continuing `existing` when given."""
    before = 0 if existing is None else existing.length
    cache = CacheSpec(network, 1, tokens.shape[0], dtype).zeros()
    if existing is not None:
        # The old scratch row is dropped: the new rows follow the old ones, with a fresh scratch row at the end.
        cache = jax.tree.map(lambda old, new: jnp.concatenate([old[:, :, :-1], new], axis=2), existing.cache, cache)
    index = jnp.arange(tokens.shape[0])[None]
    hidden, cache, auxiliary = decoder.forward(
        params, tokens[None], before + index, (index < length).astype(jnp.int32), network, cache
    )
    assert cache is not None
    last = jax.lax.dynamic_index_in_dim(hidden[0], length - 1, keepdims=False)
    experts = None if auxiliary.experts is None else auxiliary.experts.transpose(1, 2, 0, 3).astype(jnp.int16)
    if experts is not None and existing is not None:
        assert existing.experts is not None
        experts = jnp.concatenate([existing.experts, experts], axis=1)
    return Prefix(cache, decoder.logits(params, last, network.compute.vocab_used), before + length, experts)


@jax.named_scope("insert")
def _insert(prefix: Prefix, state: DecodeState, slots, slot_params: SlotParams, mesh: Mesh, specs: Any) -> DecodeState:
    """Returns the state with the prefix copied into `slots`; numbers outside 0..S-1 are dropped.

    `specs` are the PartitionSpecs of the state. Each device writes its own slots: nothing of the size of all is made.
    """
    everywhere, by_slot = PartitionSpec(), sharding.mesh_axes(specs.length[0])

    def copy_here(prefix, state, slots, slot_params):
        first = jax.lax.axis_index(by_slot) * state.length.shape[0] if by_slot else 0
        return _insert_here(prefix, state, slots - first, slot_params)

    # A prefix is on every device; where heads are divided, a device copies its own.
    one_slot = jax.tree.map(lambda spec: PartitionSpec(None, None, *spec[2:]), specs.cache)
    prefix_specs = dataclasses.replace(jax.tree.map(lambda _: everywhere, prefix), cache=one_slot)
    in_specs = prefix_specs, specs, everywhere, everywhere
    insert = jax.shard_map(copy_here, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=False)
    return insert(prefix, state, slots, slot_params)


def _insert_here(prefix: Prefix, state: DecodeState, slots: jax.Array, slot_params: SlotParams) -> DecodeState:
    """Returns one device's state with the prefix in its slots among `slots`, numbered from its first one."""
    rows = min(prefix.cache.rows, state.cache.rows)  # a prefix of several pieces may end in more padding than fits
    new = jax.tree.map(lambda array: jax.lax.slice_in_dim(array, 0, rows, axis=state.cache.row_axis), prefix.cache)
    count = state.length.shape[0]
    mine = (slots >= 0) & (slots < count)
    slots = jnp.where(mine, slots, count)
    ours_first = jnp.sort(slots)

    def copy(index, carry):
        """Writes cache and logits of one slot in place: a scatter would first make the prefix once for every slot."""
        cache, logits = carry
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=ours_first[index])
        cache = jax.tree.map(lambda old, new: write(old, new.astype(old.dtype), axis=1), cache, new)
        return cache, write(logits, prefix.logits[None], axis=0)

    cache, logits = jax.lax.fori_loop(0, jnp.sum(mine), copy, (state.cache, state.logits))

    def put(old, new):
        return old.at[slots].set(new, mode="drop")

    return DecodeState(
        cache=cache,
        logits=logits,
        length=put(state.length, prefix.length),
        generated=put(state.generated, 0),
        status=put(state.status, RUNNING),
        slots=jax.tree.map(put, state.slots, slot_params),
    )


class Engine(jetstream.Engine):  # ty: ignore[unsupported-base] JetStream's or, without it, our own base
    """A JetStream engine over a decoder on a mesh. Weights are arguments of every call, never state."""

    def __init__(
        self,
        network: Network,
        sampler: SamplerConfig,
        mesh: Mesh,
        stop_ids: tuple[int, ...],
        tokenizer: Any = None,
        cache_dtype: Any = None,
        record_experts: bool = False,
    ):
        """`stop_ids` and config.sampler.stop_ids end a response.

        With `record_experts` outputs hold the experts that each token was sent to, where the model has experts. Raises
        ValueError for a stop id without a row in the model's vocabulary.
        """
        self.network, self.sampler, self._mesh, self.tokenizer = network, sampler, mesh, tokenizer
        self.stop_ids, self.record_experts = self.all_stops(stop_ids), record_experts
        self.cache_dtype = jnp.dtype(cache_dtype or network.compute.compute_dtype)
        self.rows = sampler.max_prompt_tokens + sampler.max_new_tokens
        self.windows = tuple(sorted({w for w in sampler.windows if w < self.rows} | {self.rows}))
        self.buckets = tuple(
            sorted({b for b in sampler.prefill_buckets if b < sampler.max_prompt_tokens} | {sampler.max_prompt_tokens})
        )
        self.rules = sharding.decode_rules(decoder.specs(network.model), mesh, network.compute.compute_dtype)
        self._forks = sampler.slots  # width of an insert: one program for any set of slots
        self._compile()

    def all_stops(self, stop_ids: Iterable[int]) -> tuple[int, ...]:
        """Returns `stop_ids` and config.sampler.stop_ids. Raises ValueError for ids beyond the slot or model."""
        every = tuple(dict.fromkeys((*stop_ids, *self.sampler.stop_ids)))
        if len(every) > MAX_STOP_TOKENS:
            raise ValueError(
                f"sampler: {len(every)} stop ids {every}, at most {MAX_STOP_TOKENS} fit a slot; shorten "
                "config.sampler.stop_ids or the eos_token_id of config.json and generation_config.json"
            )
        if bad := [index for index in every if not 0 <= index < self.network.model.vocab_size]:
            raise ValueError(
                f"sampler: stop id {bad[0]} is none of the model's vocab_size={self.network.model.vocab_size} rows"
            )
        return every

    def _compile(self) -> None:
        network = self.network

        def decode(params, state, steps, window):
            return _decode(params, state, network, steps, window, self.record_experts)

        def prefill(params, tokens, length, existing):
            return _prefill(params, tokens, length, network, self.cache_dtype, existing)

        def insert(prefix, state, slots, slot_params):
            return _insert(prefix, state, slots, slot_params, self._mesh, specs)

        # Every program returns the same shardings, so that one compilation serves every order of calls.
        everywhere = sharding.replicated(self._mesh)
        with use_mesh(self._mesh, self.rules):
            placed = self._state_shardings()
        specs = jax.tree.map(lambda place: place.spec, placed)
        self.param_shardings = sharding.spec_shardings(decoder.specs(network.model), self._mesh, self.rules)
        self._place = tree.copier(network.compute.compute_dtype, self.param_shardings)
        self._decode = jax.jit(decode, static_argnums=(2, 3), donate_argnums=1, out_shardings=(placed, everywhere))
        self._prefill = jax.jit(prefill, out_shardings=everywhere)
        self._insert = jax.jit(insert, donate_argnums=1, out_shardings=placed)
        self._init = jax.jit(self._empty_state, out_shardings=placed)
        self._release = jax.jit(
            lambda state, slots: dataclasses.replace(state, status=state.status.at[slots].set(STOPPED, mode="drop")),
            donate_argnums=0,
            out_shardings=placed,
        )

    # Rollouts

    def decode(self, params: Any, state: DecodeState, steps: int, window: int | None = None):
        """Returns (state, StepOutput) of `steps` steps in one dispatch, reading `window` cache rows (default all)."""
        with use_mesh(self._mesh, self.rules):
            return self._decode(params, state, steps, window or self.rows)

    def window_for(self, rows: int) -> int:
        """Returns the smallest compiled window that covers `rows` cache rows."""
        return next((window for window in self.windows if window >= rows), self.rows)

    def bucket_for(self, tokens: int) -> int:
        """Returns the smallest compiled prompt length. Raises ValueError for a prompt that is too long."""
        for bucket in self.buckets:
            if bucket >= tokens:
                return bucket
        raise ValueError(f"prompt of {tokens} tokens exceeds config.sampler.max_prompt_tokens={self.buckets[-1]}")

    def bulk_insert(self, prefix: Prefix, state: DecodeState, slots, *, slot_params: SlotParams | None = None):
        """Returns the state with one prefix copied into each slot of `slots` (a list of numbers)."""
        slots = np.asarray(slots, np.int32)
        if slot_params is None:
            slot_params = self.default_slot_params(len(slots))
        padding = self._forks - len(slots)
        wide = np.concatenate([slots, np.full(padding, self.sampler.slots, np.int32)])
        slot_params = jax.tree.map(
            lambda x: np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)]), slot_params
        )
        with use_mesh(self._mesh, self.rules):
            return self._insert(prefix, state, wide, slot_params)

    def default_slot_params(self, count: int) -> SlotParams:
        """Returns greedy decoding up to the configured length: JetStream's Driver passes no sampling parameters."""
        stop = np.full((count, MAX_STOP_TOKENS), -1, np.int32)
        stop[:, : len(self.stop_ids)] = self.stop_ids
        return SlotParams(
            temperature=np.zeros(count, np.float32),
            top_p=np.ones(count, np.float32),
            top_k=np.zeros(count, np.int32),
            max_new_tokens=np.full(count, self.sampler.max_new_tokens, np.int32),
            key=np.zeros((count, 2), np.uint32),
            stop_ids=stop,
        )

    def compilations(self) -> dict[str, int]:
        """Returns how many programs each operation has compiled."""
        return {
            "place": private_jax.compilations(self._place),
            "prefill": private_jax.compilations(self._prefill),
            "insert": private_jax.compilations(self._insert),
            "decode": private_jax.compilations(self._decode),
        }

    # Planning

    def state_structs(self) -> DecodeState:
        """Returns the shapes of the decode state with their shardings."""
        with use_mesh(self._mesh, self.rules):
            return tree.structs(jax.eval_shape(self._empty_state), self._state_shardings())

    def param_structs(self, params: Any) -> Any:
        """Returns the shapes and shardings of `load_params(params)`, where `params` are arrays or structs."""
        return tree.structs(jax.eval_shape(self._place, params), self.param_shardings)

    def lowerings(self, params: Any) -> dict[str, Callable[[], jax.stages.Lowered]]:
        """Returns what lowers each program that `RolloutSampler.warm_up` compiles, by name; no array is made.

        `params` are structs of the weights with the shardings that they have in the trainer.
        """
        weights, state = self.param_structs(params), self.state_structs()
        everywhere = sharding.replicated(self._mesh)

        def struct(shape, dtype=np.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

        def traced(program, *arguments):
            with use_mesh(self._mesh, self.rules):
                return program(*arguments)

        def prompt(bucket):
            return weights, struct((bucket,)), struct(()), None

        def insert(bucket):
            prefix = tree.structs(traced(jax.eval_shape, self._prefill, *prompt(bucket)), everywhere)
            slots = struct((self._forks,))
            slot_params = jax.tree.map(lambda x: struct(x.shape, x.dtype), self.default_slot_params(self._forks))
            return traced(self._insert.lower, prefix, state, slots, slot_params)

        named = {"place": lambda: self._place.lower(params)}
        for bucket in self.buckets:
            named[f"prefill {bucket}"] = lambda bucket=bucket: traced(self._prefill.lower, *prompt(bucket))
            named[f"insert {bucket}"] = lambda bucket=bucket: insert(bucket)
        for window in self.windows:
            arguments = weights, state, self.sampler.steps_per_dispatch, window
            named[f"decode {window}"] = lambda arguments=arguments: traced(self._decode.lower, *arguments)
        return named

    # JetStream's Engine API

    def load_params(self, params: Any = None) -> Any:
        """Returns a copy of `params` in the compute dtype, sharded for decoding; one program for any sharding."""
        return self._place(params)

    def prefill(
        self, *, params, existing_prefix=None, padded_tokens, true_length, sampler=None, request_id=None
    ) -> Prefix:
        """Returns the prefix of int32 padded_tokens [Tb], of which the first true_length count."""
        tokens = np.asarray(padded_tokens, np.int32)
        if not 0 < int(true_length) <= tokens.shape[0]:
            raise ValueError(f"Engine.prefill: true_length={true_length} with {tokens.shape[0]} padded tokens")
        before = 0 if existing_prefix is None else int(existing_prefix.length)
        if before + int(true_length) >= self.rows:
            raise ValueError(
                f"Engine.prefill: {before} + {true_length} prompt tokens fill the {self.rows} cache rows of a slot"
            )
        with use_mesh(self._mesh, self.rules):
            return self._prefill(params, tokens, np.int32(true_length), existing_prefix)

    def insert(self, prefix, decode_state, slot, request_id=None, *, slot_params=None) -> DecodeState:
        """Returns the state with the prefix in one slot; decoding is greedy without slot_params (arrays of [1])."""
        return self.bulk_insert(prefix, decode_state, [int(slot)], slot_params=slot_params)

    def generate(self, params, decode_state, sampler=None):
        """Returns (state, ResultTokens) of one step over all slots."""
        state, out = self.decode(params, decode_state, 1)
        data = jnp.concatenate([out.tokens, out.valid.astype(jnp.int32), state.generated[:, None]], axis=1)
        result = jetstream.ResultTokens(
            data=data, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )
        return state, result

    def init_decode_state(self) -> DecodeState:
        """Returns a state whose slots are all idle."""
        with use_mesh(self._mesh, self.rules):
            return self._init()

    def _empty_state(self) -> DecodeState:
        slots = self.sampler.slots
        return DecodeState(
            cache=CacheSpec(self.network, slots, self.rows, self.cache_dtype).zeros(),
            logits=jnp.zeros((slots, self.network.model.vocab_size), jnp.float32),
            length=jnp.zeros(slots, jnp.int32),
            generated=jnp.zeros(slots, jnp.int32),
            status=jnp.full(slots, STOPPED, jnp.int32),
            slots=jax.tree.map(jnp.asarray, self.default_slot_params(slots)),
        )

    def _state_shardings(self) -> DecodeState:
        spec = CacheSpec(self.network, self.sampler.slots, self.rows, self.cache_dtype)

        def place(leaf):
            axes = spec.axes if leaf.shape == spec.shape else ("slots", *([None] * (leaf.ndim - 1)))
            return sharding.sharding(self._mesh, axes, leaf.shape, self.rules)

        return jax.tree.map(place, jax.eval_shape(self._empty_state))

    def release(self, state: DecodeState, slots) -> DecodeState:
        """Returns the state with these slots idle; the old state is donated."""
        wide = np.full(self.sampler.slots, self.sampler.slots, np.int32)
        wide[: len(slots)] = slots
        return self._release(state, wide)

    def free_resource(self, slot: int) -> None:
        """Does nothing: a dense cache row needs no freeing."""

    def get_prefix_destination_sharding(self):
        return sharding.replicated(self._mesh)

    def get_tokenizer(self):
        return jetstream.TokenizerParameters(path=getattr(self.tokenizer, "source", ""), extra_ids=0)

    def build_tokenizer(self, metadata=None):
        """Returns the engine's tokenizer behind JetStream's interface; without one only token prompts are served."""
        from r1jax.sampler.serve import DriverTokenizer

        return DriverTokenizer(self.tokenizer, self.stop_ids)

    @property
    def max_concurrent_decodes(self) -> int:
        return self.sampler.slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self.sampler.max_prompt_tokens

    @property
    def mesh(self) -> Mesh:
        return self._mesh

    @property
    def colocated_cpus(self):
        return None

    @property
    def use_chunked_prefill(self) -> bool:
        return False

    @property
    def prefill_chunk_size(self) -> int:
        return self.buckets[-1]
