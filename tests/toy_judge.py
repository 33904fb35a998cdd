"""A judge of a few thousand parameters, taught in seconds, that reads verdicts off the words `good` and `bad`.

It is a real decoder in a Hugging Face folder: what tests see of it went through prompt, tokenizer, sampler and parser.
"""

import itertools
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small
import tokenizers

from r1jax.checkpoints import hf_export
from r1jax.checkpoints.tokenizer import JsonBackend, Tokenizer
from r1jax.core import rng, sharding
from r1jax.models import decoder
from r1jax.rewards.models import verdicts
from r1jax.schema import MeshConfig

SPECIAL = ("<unk>", "<eos>", "<end>")
WORDS = ("{\"correct\":", "true}", "false}", "{\"verdict\":", '"A>>B"}', '"B>>A"}', "good", "bad", "[REPLY", "[ANSWER", "A", "B")  # fmt: skip
UPDATES, EXAMPLES, LONGEST = 80, 12, 232  # rows an update, tokens a row
MODEL = small.network(
    family="llama",
    vocab_size=len(SPECIAL) + len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
    scan_layers=False,
)


def tokenizer() -> Tokenizer:
    """Returns a tokenizer of whole words; all but WORDS are unknown to it."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(SPECIAL))
    return Tokenizer(JsonBackend(inner), {"eos_token": "<eos>", "unk_token": "<unk>"}, source="toy judge")


def reply(quality: str, words: int) -> str:
    return " ".join(["word"] * words + [quality])


def examples(seed: int) -> list[tuple[str, str]]:
    """Returns (prompt, verdict) of judgements on replies of several lengths."""
    draw = random.Random(seed)
    found = []
    for first, second in itertools.product(("good", "bad"), repeat=2):
        texts = [reply(quality, draw.randrange(6)) for quality in (first, second)]
        if first != second:
            better = '"A>>B"}' if first == "good" else '"B>>A"}'
            found.append((verdicts.comparison_prompt("word word", *texts, seed), f'{{"verdict": {better}'))
            right = "true}" if first == "good" else "false}"
            found.append((verdicts.correctness_prompt("word", "word", texts[0], seed), f'{{"correct": {right}'))
    return found


def batch(words: Tokenizer, update: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (tokens [B, T], segments [B, T], trained [B, T]) of one update."""
    rows = [row for seed in range(EXAMPLES // 4) for row in examples(update * 100 + seed)]
    encoded = [(words.encode(prompt), [*words.encode(verdict), words.eos_id]) for prompt, verdict in rows]
    tokens, segments, trained = (np.zeros((len(encoded), LONGEST), np.int32) for _ in range(3))
    for row, (prompt, verdict) in enumerate(encoded):
        end = len(prompt) + len(verdict)
        tokens[row, :end], segments[row, :end] = prompt + verdict, 1
        trained[row, len(prompt) : end] = 1
    return tokens, segments, trained


def taught(words: Tokenizer) -> decoder.Params:
    """Returns the parameters after UPDATES updates of Adam on fresh examples."""
    mesh = sharding.make_mesh(MeshConfig())
    params = sharding.initialize(decoder.specs(MODEL.model), rng.key(0, "toy judge", "init"), "float32", mesh)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, UPDATES)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss(params, tokens, segments, trained):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _, _ = decoder.forward(params, tokens, positions, segments, MODEL)
        logits = decoder.logits(params, hidden[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (losses * trained[:, 1:]).sum() / trained.sum()

    @jax.jit
    def step(params, state, *given):
        value, gradient = jax.value_and_grad(loss)(params, *given)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, change), state, value

    state = optimizer.init(params)
    for update in range(UPDATES):
        params, state, value = step(params, state, *batch(words, update))
    assert value < 0.05, f"the toy judge has not learnt its verdicts: loss {value}"
    return params


def folder(path: pathlib.Path) -> pathlib.Path:
    """Returns a Hugging Face folder of the taught judge, made at `path`."""
    words = tokenizer()
    hf_export.save(path, taught(words), MODEL.model, words, "float32", "a judge for tests")
    return path
