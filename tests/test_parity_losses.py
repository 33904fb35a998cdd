"""The peer presets against the peers' own functions: TRL's GRPOTrainer._compute_loss and Tunix's grpo_loss_fn."""

import collections
import importlib.util
import os
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import torch

from r1jax.configs import _losses
from r1jax.rl import losses
from r1jax.schema import GRPOConfig, replace


def peer(name):
    """Returns the import specification of a peer's package; without it the test is skipped, and fails when CI=true."""
    found = importlib.util.find_spec(name)
    if found is None and os.environ.get("CI", "").lower() != "true":
        pytest.skip(f"no {name}; bash launch/test.sh --parity installs it")
    assert found is not None, f"{name} is not installed"
    return found


@pytest.fixture(scope="module")
def batch():
    """Returns a batch of six rows: ratios on both sides of every bound, an empty row, advantages of both signs and 0."""
    generator = np.random.default_rng(4)
    shape = (6, 9)
    mask = (np.arange(9) < np.asarray([9, 1, 5, 0, 7, 3])[:, None]).astype(np.float32)
    behaviour = -np.abs(generator.normal(0, 2, shape))
    old = behaviour + generator.normal(0, 0.15, shape)
    found = dict(behaviour_logp=behaviour, old_logp=old, reference_logp=behaviour + generator.normal(0, 0.5, shape))
    found["advantage"] = np.repeat(np.asarray([1.2, -0.7, 0.0, 0.4, -1.3, 0.9])[:, None], 9, axis=1)
    found = {name: (array * mask).astype(np.float32) for name, array in found.items()}
    logp = (old + generator.normal(0, 0.6, shape)).astype(np.float32)
    return found | dict(loss_mask=mask, segments=mask.astype(np.int32), entropy=np.ones(shape, np.float32), logp=logp)


def ours(batch, config, longest=9):
    """Returns (loss, gradient by log-prob)."""
    lengths = batch["loss_mask"].sum(axis=1)
    counted = None if config.denominator == "all" else lengths > 0
    weights = losses.token_weights(lengths, config, longest, counted)
    arrays = batch | {"weight": np.repeat(weights[:, None], batch["logp"].shape[1], axis=1)}
    given = losses.arguments(config, config.kl_coef, 1.0)
    function = lambda logp: losses.policy_loss(logp, batch["entropy"], arrays, given, config)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(function))(batch["logp"])
    return float(value), np.asarray(gradient)


@pytest.fixture(scope="module")
def trl_defaults(tmp_path_factory):
    peer("trl")
    from trl import GRPOConfig as TRLConfig

    return TRLConfig(output_dir=str(tmp_path_factory.mktemp("trl")), report_to=[], bf16=False, use_cpu=True)


def trl_loss(batch, arguments, longest=9, weights=None, **changed):
    """Returns (loss, gradient by log-prob) of TRL's own loss with its defaults but for `changed`."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    values = {name: getattr(arguments, name) for name in ("loss_type", "beta", "importance_sampling_level")}
    values |= {name: value for name, value in changed.items() if name not in ("delta", "use_bias_correction_kl")}
    logp = torch.tensor(batch["logp"], requires_grad=True)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.tensor(batch["entropy"]), None),
        accelerator=types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=types.SimpleNamespace(**(vars(arguments) | changed | {"steps_per_generation": 1})),
        model=types.SimpleNamespace(training=True),
        max_completion_length=longest,
        top_entropy_quantile=arguments.top_entropy_quantile,
        off_policy_mask_threshold=values.pop("off_policy_mask_threshold", arguments.off_policy_mask_threshold),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        epsilon_low=values.pop("epsilon", arguments.epsilon),
        epsilon_high=values.pop("epsilon_high", arguments.epsilon_high or arguments.epsilon),
        current_gradient_accumulation_steps=1,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=arguments.vllm_importance_sampling_correction,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        **values,
    )
    mask = torch.tensor(batch["loss_mask"])
    inputs = dict(prompt_ids=mask[:, :2].long(), prompt_mask=mask[:, :2], completion_ids=mask.long())
    inputs |= dict(completion_mask=mask, advantages=torch.tensor(batch["advantage"]), num_items_in_batch=mask.sum())
    inputs |= {f"{name}_per_token_logps": torch.tensor(batch[f"{name}_logp"]) for name in ("old", "reference")}
    inputs["ref_per_token_logps"] = inputs.pop("reference_per_token_logps")
    inputs["sampling_per_token_logps"] = torch.tensor(batch["behaviour_logp"])
    if weights is not None:
        inputs["importance_sampling_ratio"] = torch.tensor(weights)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), logp.grad.numpy()


def agree(ours_, theirs):
    assert ours_[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(ours_[1], theirs[1], rtol=2e-5, atol=1e-7)
    assert np.abs(theirs[1]).max() > 1e-3


def test_trl_default_is_what_trl_computes_with_its_defaults(batch, trl_defaults):
    config = _losses.grpo("trl_default")
    assert trl_defaults.vllm_importance_sampling_mode == config.mismatch
    assert trl_defaults.vllm_importance_sampling_clip_max == config.mismatch_threshold
    assert (trl_defaults.scale_rewards, trl_defaults.loss_type, trl_defaults.beta) == ("group", "dapo", 0.0)
    assert not trl_defaults.mask_truncated_completions
    gap = batch["loss_mask"] * (batch["old_logp"] - batch["behaviour_logp"])
    weights = np.exp(gap.sum(axis=1, keepdims=True)).astype(np.float32)
    weights[weights > trl_defaults.vllm_importance_sampling_clip_max] = 0
    agree(ours(batch, config), trl_loss(batch, trl_defaults, weights=weights))


RECOMPUTED = dict(old_logp="recomputed", clip_ratio=0.2)
TRL_FORMS = {
    "grpo": (dict(kl_coef=0.04, kl_estimator="k3_weighted"), dict(loss_type="grpo", beta=0.04)),
    "k3": (dict(kl_coef=0.04), dict(loss_type="grpo", beta=0.04, use_bias_correction_kl=False)),
    "delta": (dict(kl_coef=0.0, ratio_cap=1.3), dict(loss_type="grpo", delta=1.3)),
    "dr_grpo": (
        dict(kl_coef=0.04, kl_estimator="k3_weighted", aggregation="seq_mean_token_sum"),
        dict(loss_type="dr_grpo", beta=0.04),
    ),
    "dapo": (
        dict(
            kl_coef=0.1,
            kl_estimator="k3_weighted",
            aggregation="token_mean",
            denominator="trained",
            clip_ratio_high=0.28,
        ),
        dict(loss_type="dapo", beta=0.1, epsilon_high=0.28),
    ),
    "gspo": (dict(kl_coef=0.0, ratio="sequence"), dict(loss_type="grpo", importance_sampling_level="sequence")),
    "cispo": (
        dict(
            kl_coef=0.0,
            surrogate="cispo",
            clip_ratio=1.0,
            clip_ratio_high=0.5,
            aggregation="token_mean",
            denominator="trained",
        ),
        dict(loss_type="cispo", epsilon_high=1.5),
    ),
    "sapo": (dict(kl_coef=0.0, surrogate="sapo"), dict(loss_type="sapo")),
    "off_policy_mask": (
        dict(kl_coef=0.0, off_policy_threshold=0.05),
        dict(loss_type="grpo", off_policy_mask_threshold=0.05),
    ),
}


@pytest.mark.parametrize("name", TRL_FORMS)
def test_options_are_what_trl_computes(batch, trl_defaults, name):
    fields, changed = TRL_FORMS[name]
    config = GRPOConfig(**(RECOMPUTED | fields))
    agree(ours(batch, config), trl_loss(batch, trl_defaults, **changed))


@pytest.fixture(scope="module")
def algo_core():
    """Returns Tunix's module of losses; its packages' own __init__ import datasets that no loss needs."""
    root = pathlib.Path(peer("tunix").submodule_search_locations[0])
    for name in ("tunix", "tunix.rl", "tunix.sft", "tunix.oss"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    try:
        yield importlib.import_module("tunix.rl.algo_core")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tunix"]:
            del sys.modules[name]


class Table(nnx.Module):
    """A model whose logits are its only parameter, [B, T, V]."""

    def __init__(self, logits):
        self.logits = nnx.Param(logits)

    def __call__(self, tokens, positions, cache, attention_mask):
        return self.logits[...], None


TUNIX = types.SimpleNamespace(beta=0.04, epsilon=0.2, loss_algo="grpo", temperature=1.0, kl_clamp_value=None)
TUNIX_FORMS = {
    "tunix_default": ({}, {}),
    "token_mean": (dict(aggregation="token_mean"), dict(loss_agg_mode="token-mean")),
    "k3": (dict(kl_estimator="k3"), dict(kl_loss_mode="low_var_kl")),
    "k2": (dict(kl_estimator="k2"), dict(kl_loss_mode="mse_kl")),
    "gspo_token": (dict(ratio="sequence_token"), dict(loss_algo="gspo-token")),
    "dual_clip": (dict(dual_clip=1.5), dict(epsilon_c=1.5)),
}


@pytest.mark.parametrize("name", TUNIX_FORMS)
def test_tunix_default_and_options_are_what_tunix_computes(batch, algo_core, name):
    fields, changed = TUNIX_FORMS[name]
    config = replace(_losses.grpo("tunix_default"), **fields)
    generator, (rows, tokens) = np.random.default_rng(5), batch["logp"].shape
    logits = generator.normal(0, 1.5, (rows, 2 + tokens, 11)).astype(np.float32)
    completion = generator.integers(1, 11, (rows, tokens)).astype(np.int32)
    defaults = dict(loss_agg_mode="sequence-mean-token-mean", kl_loss_mode="kl")
    settings = types.SimpleNamespace(**(vars(TUNIX) | defaults | changed))

    def log_probs(logits):
        every = jax.nn.log_softmax(logits[:, 1:-1])
        return jnp.take_along_axis(every, completion[..., None], axis=-1)[..., 0]

    drawn = np.asarray(log_probs(logits)) + generator.normal(0, 0.5, (rows, tokens)).astype(np.float32)
    arrays = batch | {"behaviour_logp": drawn, "reference_logp": drawn + batch["old_logp"] - batch["behaviour_logp"]}

    def theirs(logits):
        example = types.SimpleNamespace(
            prompt_ids=np.ones((rows, 2), np.int32),
            completion_ids=completion,
            completion_mask=batch["loss_mask"],
            advantages=batch["advantage"],
            old_per_token_logps=arrays["behaviour_logp"],
            ref_per_token_logps=arrays["reference_logp"],
        )
        return algo_core.grpo_loss_fn(Table(logits), example, settings, pad_id=0, eos_id=1)[0]

    weights = losses.token_weights(batch["loss_mask"].sum(1), config, tokens, batch["loss_mask"].any(1))
    arrays["weight"] = np.repeat(weights[:, None], tokens, axis=1)
    given = losses.arguments(config, config.kl_coef, 1.0)
    mine = lambda logits: losses.policy_loss(log_probs(logits), batch["entropy"], arrays, given, config)[0]  # noqa: E731
    (value, gradient), (wanted, slope) = (
        jax.value_and_grad(function)(jnp.asarray(logits)) for function in (mine, theirs)
    )
    agree((float(value), np.asarray(gradient)), (float(wanted), np.asarray(slope)))


def test_gae_and_the_value_loss_are_tunix(algo_core, monkeypatch):
    from r1jax.rl import ppo

    generator, mask = np.random.default_rng(7), (np.arange(6) < np.asarray([6, 2, 4])[:, None]).astype(np.float32)
    rewards, values, old = generator.normal(size=(3, 3, 6)).astype(np.float32) * mask
    advantages, returns = algo_core.compute_gae_advantages(rewards, values, mask, 0.98, 0.9)
    lengths = mask.sum(axis=1).astype(int)
    plain = [ppo.gae(rewards[i, :n], values[i, :n], 0.98, 0.9) for i, n in enumerate(lengths)]
    for i, (n, white) in enumerate(zip(lengths, ppo.whitened(plain, np.ones(3, bool)), strict=True)):
        np.testing.assert_allclose(white, advantages[i, :n], rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(plain[i] + values[i, :n], returns[i, :n], rtol=1e-5, atol=1e-6)
    example = types.SimpleNamespace(
        prompt_ids=mask[:, :2], completion_ids=mask, completion_mask=mask, old_values=old, returns=returns
    )
    predicted = np.concatenate([np.zeros((3, 1), np.float32), values, np.zeros((3, 1), np.float32)], axis=1)
    monkeypatch.setattr(algo_core.common, "compute_score", lambda *_, **__: predicted)
    theirs, _ = algo_core.ppo_value_loss_fn(None, example, 0.2, 0, 1)
    mine = ppo.value_loss(predicted[:, 1:-1], old, returns, 0.2)
    assert float((mine * mask).sum() / mask.sum()) == pytest.approx(float(theirs), rel=1e-5)


def test_tunix_advantages_are_those_of_the_preset(algo_core):
    from r1jax.rl.advantages import group_advantages

    rewards = np.random.default_rng(6).random(12).astype(np.float32)
    ones, everyone = np.ones(1, np.float32), np.ones(12, bool)
    grpo = _losses.grpo("tunix_default")
    found, _, _ = group_advantages(
        rewards[:, None], ones, everyone, 4, grpo.advantage_epsilon, ddof=grpo.advantage_ddof
    )
    np.testing.assert_allclose(found, algo_core.compute_advantages(rewards, 4), rtol=1e-5)
    left_out, _, _ = group_advantages(rewards[:, None], ones, everyone, 4, kind="leave_one_out")
    np.testing.assert_allclose(
        left_out, algo_core.compute_rloo_advantages(jnp.asarray(rewards), 4), rtol=1e-5, atol=1e-7
    )
