"""A small Llama checkpoint with a tokenizer of bytes, written by hand: vocabulary, padding and stop ids as a test wants them."""

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257 and 258
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def byte_tokenizer(special=SPECIAL, bos: str = "") -> tokenizers.Tokenizer:
    """Returns a tokenizer with one token a byte, then the special ones; `bos` is what its post-processor puts first."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(special))
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return made


def write_tokenizer(folder: pathlib.Path, special=SPECIAL, bos: str = "", **config) -> pathlib.Path:
    """Returns the folder with tokenizer.json and tokenizer_config.json, whose end token is the first special one."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(special, bos).save(str(folder / "tokenizer.json"))
    config = {"eos_token": special[0], "tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write(folder: pathlib.Path, vocab_size: int, loud_from: int = 0, shape=SHAPE, **config) -> pathlib.Path:
    """Returns a whole folder; output rows from `loud_from` on (0: none) give far larger logits than all others.

    `config` goes into tokenizer_config.json, as `write_tokenizer` has it.
    """
    write_tokenizer(folder, **config)
    (folder / "config.json").write_text(json.dumps(dict(shape) | {"vocab_size": vocab_size}), encoding="utf-8")
    generator, width, inner = np.random.default_rng(0), shape["hidden_size"], shape["intermediate_size"]
    small = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sizes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (small, width), "self_attn.v_proj": (small, width)}
    sizes |= {"self_attn.o_proj": (width, width), "mlp.down_proj": (width, inner)}
    sizes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    weights = {"model.embed_tokens": (vocab_size, width), "lm_head": (vocab_size, width)}
    norms = ["model.norm"]
    for layer in range(shape["num_hidden_layers"]):
        weights |= {f"model.layers.{layer}.{name}": size for name, size in sizes.items()}
        norms += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    arrays = {f"{name}.weight": generator.normal(size=size) * 0.1 for name, size in weights.items()}
    arrays |= {f"{name}.weight": np.ones(width) for name in norms}
    if loud_from:
        arrays["lm_head.weight"][loud_from:] *= 50
    save_file({name: value.astype(np.float32) for name, value in arrays.items()}, folder / "model.safetensors")
    return folder


def stops(folder: pathlib.Path, config=None, generation=None) -> pathlib.Path:
    """Returns the folder with eos_token_id in config.json and in generation_config.json, where given."""
    for name, ids in (("config.json", config), ("generation_config.json", generation)):
        if ids is not None:
            path = folder / name
            fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            path.write_text(json.dumps(fields | {"eos_token_id": ids}), encoding="utf-8")
    return folder
