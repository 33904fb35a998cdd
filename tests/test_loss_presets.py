"""Every named loss, value and gradient, against the float64 references of reference_losses.py, and its advantages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as theirs

from r1jax import config as configs
from r1jax.configs import _losses
from r1jax.rl import losses
from r1jax.rl.advantages import group_advantages
from r1jax.schema import GRPOConfig

LONGEST = 10


def samples(huge=30.0):
    """Returns eight samples: one token, a ratio of exp(huge), A < 0 with a ratio above 11, A = 0, none trained, ordinary ones."""
    generator = np.random.default_rng(0)
    made = []
    for index, length in enumerate((1, 5, 3, 7, 2, 4, 4, 6)):
        draw = lambda scale, length=length: generator.normal(0, scale, length).astype(np.float32).astype(np.float64)  # noqa: E731
        logp = -np.abs(draw(2.0))
        behaviour = logp + (draw(0.02) if index == 6 else draw(0.4))
        if index == 1:
            behaviour[2] = logp[2] - huge
        if index == 3:
            behaviour[1:3] = logp[1:3] - 3
        made.append(
            dict(
                logp=logp,
                behaviour=behaviour,
                old=behaviour + draw(0.3),
                reference=logp + draw(0.5),
                entropy=np.abs(draw(1.0)),
                advantage=float(np.float32((0.7, 1.3, -0.4, -1.1, 0.0, 2.0, -0.9, -0.3)[index])),
                trained=index != 5,
                frozen=logp.copy(),
            )
        )
    return made


def laid_out(found, rows):
    """Returns (batch of [R, T] arrays without weights, place of each sample); rows are lists of sample numbers."""
    width = max(sum(len(found[i]["logp"]) for i in row) for row in rows) + 2
    names = ("logp", "old_logp", "behaviour_logp", "reference_logp", "entropy", "advantage", "loss_mask", "weight")
    batch = {name: np.zeros((len(rows), width), np.float32) for name in names}
    batch["segments"] = np.zeros((len(rows), width), np.int32)
    places = {}
    for number, row in enumerate(rows):
        start = 1
        for segment, index in enumerate(row, 1):
            sample, place = found[index], slice(start, start + len(found[index]["logp"]))
            for name in ("logp", "entropy", "advantage"):
                batch[name][number, place] = sample[name]
            for name in ("old", "behaviour", "reference"):
                batch[f"{name}_logp"][number, place] = sample[name]
            batch["loss_mask"][number, place] = sample["trained"]
            batch["segments"][number, start - (segment == 1) : place.stop] = segment
            places[index], start = (number, place), place.stop
    return batch, places


def ours(found, rows, config):
    """Returns (loss, its gradient by sample, statistics)."""
    batch, places = laid_out(found, rows)
    trained = [s["trained"] for s in found]
    counted = np.ones(len(found), bool) if config.denominator == "all" else np.asarray(trained)
    weights = losses.token_weights([len(s["logp"]) for s in found], config, LONGEST, counted)
    for index, (row, place) in places.items():
        batch["weight"][row, place] = weights[index]
    given = losses.arguments(config, config.kl_coef, 1.0)

    @jax.jit
    def loss(logp):
        return losses.policy_loss(logp, batch["entropy"], batch, given, config)

    (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(batch["logp"]))
    return float(value), [np.asarray(grad)[places[i][0], places[i][1]] for i in range(len(found))], stats


def compare(found, config, reference):
    expected, gradients = reference(found, LONGEST), theirs.gradient(reference, found, LONGEST)
    each_its_row, packed = [[i] for i in range(len(found))], [[0, 3, 1], [5, 2], [7, 4, 6]]
    for rows in (each_its_row, packed):
        value, grads, stats = ours(found, rows, config)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for grad, wanted in zip(grads, gradients, strict=True):
            np.testing.assert_allclose(grad, wanted, rtol=2e-5, atol=2e-6)
        assert float(stats["tokens"]) == sum(len(s["logp"]) for s in found if s["trained"])


@pytest.mark.parametrize("name", theirs.PRESETS)
def test_preset_equals_its_reference_in_value_and_gradient(name):
    compare(samples(), _losses.grpo(name), theirs.PRESETS[name])


@pytest.mark.parametrize(
    "fields, reference", theirs.OPTIONS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_option_equals_its_reference_in_value_and_gradient(fields, reference):
    compare(samples(huge=4.0), GRPOConfig(**fields), reference)


HAND = {  # ratios (1.5, 0.5) with A = 1 and log-probs (-1, -2); ratio 4 with A = -1 and log-prob -0.5; the reference is the policy
    "r1_paper": 1.5,  # -((1.5 + 0.5) / 2 - 4) / 2
    "deepseekmath": 1.575,  # -((1.2 + 0.5) / 2 - 4) / 2
    "dapo": 0.74,  # -(1.28 + 0.5 - 4) / 3
    "dr_grpo": 0.115,  # -(1.2 + 0.5 - 4) / (2 * 10)
    "gspo": 1.5669873,  # -(sqrt(0.75) - 4) / 2
    "cispo": 1 / 6,  # -(1.5 * -1 + 0.5 * -2 + 4 * -1 * -0.5) / 3
    "rloo": 1.15,  # -(1.2 + 0.5 - 4) / 2
    "trl_default": 0.7666667,  # -(1.2 + 0.5 - 4) / 3
    "verl_default": 0.4333333,  # -(1.2 + 0.5 - 3) / 3
    "tunix_default": 1.575,
}


@pytest.mark.parametrize("name", HAND)
def test_preset_gives_the_number_worked_out_by_hand(name):
    found = []
    for logp, ratio, advantage in (((-1.0, -2.0), (1.5, 0.5), 1.0), ((-0.5,), (4.0,), -1.0)):
        logp = np.asarray(logp)
        old = logp - np.log(ratio)
        same = dict(old=old, behaviour=old, reference=logp, entropy=logp * 0)
        found.append(dict(logp=logp, advantage=advantage, trained=True, frozen=logp, **same))
    value, _, stats = ours(found, [[0, 1]], _losses.grpo(name))
    cut = {"r1_paper": 0, "gspo": 0, "cispo": 0, "verl_default": 2}.get(name, 1)  # verl: the dual clip as well
    assert float(stats["clip_fraction"]) == cut
    assert value == pytest.approx(HAND[name], rel=1e-5)
    assert theirs.PRESETS[name](found, LONGEST) == pytest.approx(HAND[name], rel=1e-6)


@pytest.mark.parametrize("name", theirs.PRESETS)
def test_a_batch_without_a_trained_token_is_zero_in_value_and_gradient(name):
    found = [s | {"trained": False} for s in samples()]
    value, grads, stats = ours(found, [[0, 3, 1], [5, 2], [7, 4, 6]], _losses.grpo(name))
    assert value == 0 and not any(grad.any() for grad in grads)
    assert all(np.isfinite(float(stat)) for stat in stats.values())


def test_a_ratio_above_eleven_is_cut_where_the_advantage_is_positive_and_followed_where_it_is_negative():
    logp = np.asarray([-1.0])
    base = dict(
        logp=logp, old=logp - 3, behaviour=logp - 3, reference=logp, entropy=logp * 0, trained=True, frozen=logp
    )
    for advantage, slope in ((1.0, 0.0), (-1.0, np.exp(3))):  # d loss / d logp
        _, grads, stats = ours([base | {"advantage": advantage}], [[0]], _losses.grpo("r1_paper"))
        assert grads[0][0] == pytest.approx(slope, rel=1e-5)
        assert float(stats["clip_fraction"]) == (advantage > 0)


def far(gap, advantage=1.0, behaviour=0.0):
    """Returns one sample of three tokens: at the second, log(reference / policy) is `gap` and log(policy / sampler) `behaviour`."""
    logp = np.asarray([-1.0, -2.0, -1.5])
    reference, sampler = logp + [0.1, gap, -0.2], logp - [0.0, behaviour, 0.0]
    found = dict(logp=logp, old=sampler, behaviour=sampler, reference=reference, entropy=logp * 0, frozen=logp)
    return found | {"advantage": advantage, "trained": True}


KL_OPTIONS = [(fields, loss) for fields, loss in theirs.OPTIONS if "kl_estimator" in fields]


@pytest.mark.parametrize("gap", [8.0, 21.0, 200.0, -200.0])
@pytest.mark.parametrize("fields, reference", KL_OPTIONS, ids=[str(fields) for fields, _ in KL_OPTIONS])
def test_a_token_far_from_the_reference_has_the_loss_and_gradient_of_the_clamped_formula(fields, reference, gap):
    found = [far(gap), *samples(huge=4.0)[:1]]
    # A step that leaves differences of a loss of 1e8 some digits in float64.
    expected, gradients = reference(found, LONGEST), theirs.gradient(reference, found, LONGEST, step=1e-3)
    value, grads, stats = ours(found, [[0, 1]], GRPOConfig(**fields))
    assert value == pytest.approx(expected, rel=1e-5)
    for grad, wanted in zip(grads, gradients, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-3)
    clamped = {"k3_clamped": abs(gap) > 20}.get(fields["kl_estimator"], gap > 20)
    assert float(stats.get("kl_clamped", clamped)) == clamped


def test_the_bound_of_the_kl_terms_log_ratio_is_a_field_and_what_no_float_holds_is_refused():
    for bound in (2.0, 30.0):
        _, _, stats = ours([far(25.0)], [[0]], GRPOConfig(kl_coef=0.5, kl_log_ratio_clamp=bound))
        assert float(stats["kl_clamped"]) == (bound == 2.0)
    for field in ("kl_log_ratio_clamp", "log_ratio_clamp"):
        with pytest.raises(ValueError, match=f"GRPOConfig.{field}=100 must be at most 80"):
            GRPOConfig(**{field: 100})


@pytest.mark.parametrize("estimator", [*theirs.KLS])
@pytest.mark.parametrize("clamp", [0.0, 20.0])
def test_a_coefficient_of_zero_leaves_the_kl_term_out_of_value_and_gradient_whatever_it_is(estimator, clamp):
    schedule = dict(kl_coef=0.0, kl_coef_schedule=((0, 0.0), (10, 0.5)))
    with_term = GRPOConfig(**schedule, kl_estimator=estimator, kl_log_ratio_clamp=clamp)
    found = [far(200.0), *samples(huge=4.0)]
    rows = [[number] for number in range(len(found))]
    value, grads, stats = ours(found, rows, with_term)
    without, expected, _ = ours(found, rows, GRPOConfig(kl_coef=0.0))
    assert value == without and "kl" in stats
    for grad, wanted in zip(grads, expected, strict=True):
        assert np.array_equal(grad, wanted)


def test_what_stands_at_untrained_tokens_does_not_reach_the_gradient():
    found = [far(200.0) | {"trained": False}, far(0.3)]
    value, grads, _ = ours(found, [[0, 1]], GRPOConfig(kl_coef=0.5, kl_log_ratio_clamp=0.0))
    alone, expected, _ = ours(found[1:], [[0]], GRPOConfig(kl_coef=0.5, kl_log_ratio_clamp=0.0))
    assert value == pytest.approx(alone / 2, rel=1e-6) and not grads[0].any()
    np.testing.assert_allclose(grads[1], expected[0] / 2, rtol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_ratio_that_overflows_is_clipped_and_not_nan(ratio, advantage):
    config = GRPOConfig(kl_coef=0.0, ratio=ratio)
    value, grads, _ = ours([far(0.0, advantage, behaviour=400.0)], [[0]], config)
    assert np.isfinite(value) and np.isfinite(grads[0]).all()
    if ratio == "token":
        assert value == pytest.approx(-advantage * (1 + 11 + 1) / 3, rel=1e-6) and grads[0][1] == 0


# Advantages


def of_groups(groups, **options):
    """Returns our advantages of groups of one size, [groups, size]."""
    rewards = np.asarray(groups, np.float32).reshape(-1, 1)
    size = len(groups[0])
    values, _, _ = group_advantages(rewards, np.ones(1, np.float32), np.ones(len(rewards), bool), size, **options)
    return np.asarray(values).reshape(-1, size)


def options_of(name):
    grpo = _losses.grpo(name)
    return dict(
        epsilon=grpo.advantage_epsilon,
        kind=grpo.advantage,
        ddof=grpo.advantage_ddof,
        guard=grpo.advantage_guard,
        singleton=grpo.singleton,
    )


GROUPS = [np.asarray(g, np.float64) for g in ([1, 0, 0, 0], [1, 1, 1, 1], [0.2, 1.4, 1.4, 0.0], [0, 0, 0, 0])]


@pytest.mark.parametrize("name", theirs.ADVANTAGES)
def test_advantages_of_a_preset_equal_its_reference(name):
    np.testing.assert_allclose(
        of_groups(GROUPS, **options_of(name)), theirs.ADVANTAGES[name](GROUPS), rtol=2e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", theirs.ADVANTAGES)
def test_a_group_that_ties_has_no_advantage_and_a_group_of_one_only_where_its_source_says_so(name):
    assert not of_groups([[0.3] * 5], **options_of(name)).any()
    assert of_groups([[0.7]], **options_of(name)) == pytest.approx(0.7 if name == "verl_default" else 0.0)


def test_leave_one_out_is_dr_grpo_times_g_over_g_less_one():
    np.testing.assert_allclose(
        of_groups(GROUPS, kind="leave_one_out"), of_groups(GROUPS, kind="mean") * 4 / 3, rtol=1e-6
    )


def test_batch_deviation_is_over_all_groups():
    found = of_groups(GROUPS, kind="batch_std", ddof=1, epsilon=1e-4)
    np.testing.assert_allclose(found, theirs.batch_std(GROUPS), rtol=2e-6, atol=1e-7)


def test_guard_max_bounds_the_deviation_from_below():
    rewards = [[0.0, 1e-3]]
    np.testing.assert_allclose(of_groups(rewards, guard="max", epsilon=0.5), [[-1e-3, 1e-3]], rtol=1e-5)


def test_per_reward_normalises_each_term_and_then_their_sum():
    generator = np.random.default_rng(3)
    parts, weights = generator.random((12, 3)).astype(np.float32), np.asarray([1.0, 0.5, 2.0])
    options = dict(epsilon=1e-4, kind="per_reward", ddof=1)
    found, _, _ = group_advantages(parts, weights.astype(np.float32), np.ones(12, bool), 4, **options)
    groups = list(parts.astype(np.float64).reshape(3, 4, 3))
    np.testing.assert_allclose(found, np.concatenate(theirs.per_reward(groups, weights)), rtol=2e-4, atol=1e-5)


# Means


def test_the_means_of_a_mini_batch_count_what_the_denominator_says():
    lengths, counted = [1, 4, 5], [True, False, True]
    weights = lambda **fields: losses.token_weights(lengths, GRPOConfig(**fields), 8, counted)  # noqa: E731
    np.testing.assert_allclose(weights(aggregation="token_mean"), [1 / 6] * 3, rtol=1e-6)
    np.testing.assert_allclose(weights(aggregation="seq_mean_token_mean"), [1 / 2, 1 / 8, 1 / 10], rtol=1e-6)
    np.testing.assert_allclose(weights(aggregation="token_sum"), [1] * 3, rtol=1e-6)


def test_overlong_penalty_falls_over_the_last_tokens_to_minus_one():
    config = GRPOConfig(overlong_buffer_fraction=0.2)
    np.testing.assert_allclose(losses.overlong_penalty([1, 80, 85, 90, 100], config, 100), [0, 0, -0.25, -0.5, -1])
    assert not losses.overlong_penalty([100], GRPOConfig(), 100).any()


# The command line


def test_preset_sets_the_fields_of_the_loss_and_an_override_wins_whatever_their_order():
    for overrides in (
        [("grpo.preset", "dapo"), ("grpo.kl_coef", "0.5")],
        [("grpo.kl_coef", "0.5"), ("grpo.preset", "dapo")],
    ):
        grpo = configs.load("r1_zero:tiny", overrides).grpo
        assert (grpo.preset, grpo.clip_ratio, grpo.clip_ratio_high, grpo.kl_coef) == ("dapo", 0.2, 0.28, 0.5)
        assert grpo.group_size == configs.load("r1_zero:tiny").grpo.group_size


def test_the_default_is_the_papers_preset():
    assert _losses.grpo("r1_paper") == GRPOConfig()
    assert set(_losses.PRESETS) == set(theirs.PRESETS)


def test_an_unknown_preset_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match="config.grpo.preset=dapoo: expected .*'dapo'"):
        configs.load("r1_zero:tiny", [("grpo.preset", "dapoo")])


def test_mismatch_weights_without_the_trainers_own_log_probs_are_refused():
    with pytest.raises(ValueError, match="mismatch=token_mask needs old_logp=recomputed"):
        GRPOConfig(mismatch="token_mask")
