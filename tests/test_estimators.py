"""Estimators of ∇F by exhaustive enumeration of their draws; nothing is averaged over random keys."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from equivalence.plain_layers import Geometry, dense_matrix
from jax import export

import stochsolvers as ss
from stochsolvers import estimators as es

KEY = jax.random.key(3)
RIDGE = 0.3
DENSE = (4, 3)
CONV = Geometry((2, 3), (2, 2), 3, 2, ((1, 0), (0, 1)))


class Case:
    """One problem in the library's words, and as a matrix M with A = M on flattened features."""

    def __init__(self, kind, rng, ridge=RIDGE):
        if kind == "dense":
            kernel = rng.normal(size=DENSE)
            self.matrix, linear_map = kernel.T, ss.Dense(jnp.asarray(kernel))
            x, self.sites = rng.normal(size=DENSE[0]), 1  # sites: pixels of a feature
        else:
            kernel = CONV.kernel(rng)
            self.matrix = dense_matrix(CONV, kernel)
            linear_map = ss.Conv(jnp.asarray(kernel), CONV.spatial_shape, **CONV.options)
            x, self.sites = rng.normal(size=CONV.in_shape), 6
        self.kernel = kernel
        self.n1, self.n2 = linear_map.in_features, linear_map.out_features
        self.inputs, self.ridge = x.ravel(), ridge
        bias = rng.normal(size=self.n2)
        self.bias = np.tile(bias, self.matrix.shape[0] // self.n2)
        self.problem = ss.LayerProblem(
            linear_map, jnp.asarray(x), bias=jnp.asarray(bias), ridge=ridge
        )

    def random(self, rng):
        return jnp.asarray(rng.normal(size=self.problem.shape))

    def gradient(self, z, weights=None):
        """A(w ⊙ (A* z − x)) − b + λ z, by the matrix; ∇F for w = 1."""
        weights = np.ones(self.n1) if weights is None else weights
        z = np.asarray(z).ravel()
        residual = np.tile(weights, self.sites) * (self.matrix.T @ z - self.inputs)
        return self.matrix @ residual - self.bias + self.ridge * z

    def curvature(self, weights):
        """The Hessian of Ψ for weights w: A diag(w) A* + λ I."""
        scaled = self.matrix * np.tile(weights, self.sites)
        return scaled @ self.matrix.T + self.ridge * np.eye(len(self.matrix))

    def feature_norms(self):
        return np.array(
            [np.linalg.norm(self.matrix[:, i :: self.n1], 2) ** 2 for i in range(self.n1)]
        )


def subsets(n, tau):
    """All masks with τ ones."""
    masks = [[float(i in s) for i in range(n)] for s in itertools.combinations(range(n), tau)]
    return np.array(masks)


def tau_nice_law(n, tau):
    masks = subsets(n, tau)
    return masks * (n / tau), np.full(len(masks), 1 / len(masks))


def bernoulli_law(n, q):
    masks = np.array(list(itertools.product([0.0, 1.0], repeat=n)))
    kept = masks.sum(axis=1)
    return masks / q, q**kept * (1 - q) ** (n - kept)


def serial_law(p):
    return np.diag(1 / p), p


def systematic_law(p):
    """Madow's sampling in a random order: all orders, and all pieces of the offset's interval."""
    n, law = len(p), {}
    for order in itertools.permutations(range(n)):
        ends = np.cumsum(p[list(order)])
        edges = np.unique(np.concatenate([[0, 1], ends % 1]))
        for left, right in itertools.pairwise(edges):
            mask, u, start = np.zeros(n), (left + right) / 2, 0.0
            for i, end in zip(order, ends, strict=True):
                mask[i] = np.ceil(end - u) - np.ceil(start - u)
                start = end
            law[tuple(mask)] = law.get(tuple(mask), 0) + (right - left) / math.factorial(n)
    masks = np.array([mask for mask, weight in law.items() if weight > 1e-12])
    return masks / p, np.array([weight for weight in law.values() if weight > 1e-12])


def capped(scores, tau):
    """min(1, c s_i), Σ = τ, by bisection."""
    low, high = 0.0, tau / scores.min()
    for _ in range(200):
        middle = 0.5 * (low + high)
        if np.minimum(1, middle * scores).sum() > tau:
            high = middle
        else:
            low = middle
    return np.minimum(1, high * scores)


def importance_scores(case, by, z):
    """L_i, or ||A_i|| ||(A* z − x)_i||; ||A_i||² on the padded grid, which is exact for dense."""
    spectrum = case.kernel[None, None]
    if case.sites > 1:
        spectrum = np.fft.fft2(case.kernel, s=(2 + 2 - 1, 3 + 2 - 1), axes=(0, 1))
    constants = case.n1 * (np.abs(spectrum) ** 2).sum(axis=-1).max(axis=(0, 1))
    if by == "lipschitz":
        return constants
    residual = case.matrix.T @ np.asarray(z).ravel() - case.inputs
    norms = np.linalg.norm(residual.reshape(case.sites, case.n1), axis=0)
    return np.sqrt(constants) * norms


def feature_estimators(case, z):
    """Every estimator with weights, and its law: all weights and their probabilities."""
    n = case.n1
    laws = {"full": (es.Full(), (np.ones((1, n)), np.ones(1)))}
    for tau in range(1, n + 1):
        laws[f"tau-nice {tau}"] = es.TauNice(tau), tau_nice_law(n, tau)
    laws["tau-nice fraction"] = es.TauNice(2 / n), tau_nice_law(n, 2)
    laws["bernoulli"] = es.Bernoulli(0.3), bernoulli_law(n, 0.3)
    for by in ("lipschitz", "gradient"):
        p = importance_scores(case, by, z)
        laws[f"serial {by}"] = es.SerialImportance(by), serial_law(p / p.sum())
        laws[f"importance {by}"] = es.Importance(2, by=by), systematic_law(capped(p, 2))
    return laws


def estimates(estimator, problem, z, draws):
    function = jax.jit(jax.vmap(lambda draw: estimator.gradient(problem, z, draw)))
    return np.asarray(function(jnp.asarray(draws))).reshape(len(draws), -1)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_feature_estimators_are_unbiased(kind, rng):
    case = Case(kind, rng)
    z = case.random(rng)
    truth = case.gradient(z)
    np.testing.assert_allclose(case.problem.gradient(z).ravel(), truth, rtol=1e-12, atol=1e-12)
    for name, (estimator, (weights, law)) in feature_estimators(case, z).items():
        np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
        each = estimates(estimator, case.problem, z, weights)
        formula = [case.gradient(z, w) for w in weights]
        if name != "full":
            np.testing.assert_allclose(each, formula, rtol=1e-11, atol=1e-11, err_msg=name)
        np.testing.assert_allclose(law @ each, truth, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_draws_follow_the_enumerated_law(kind, rng):
    """What `draw` returns is in the enumeration, and fills it with the enumerated frequencies."""
    case = Case(kind, rng)
    z = case.random(rng)
    keys = jax.random.split(KEY, 4000)
    for name, (estimator, (weights, law)) in feature_estimators(case, z).items():
        if name == "full":
            assert estimator.draw(KEY, case.problem, z) is None
            continue
        if name in ("tau-nice 1", "tau-nice 3") or (kind == "conv" and "gradient" not in name):
            continue  # the same code as another
        draw = jax.jit(jax.vmap(lambda key, e=estimator: e.draw(key, case.problem, z)))
        drawn = np.asarray(draw(keys))
        distance = np.abs(drawn[:, None] - weights).max(axis=-1)
        assert np.all(distance.min(axis=1) <= 1e-9 * weights.max()), name
        frequency = np.bincount(distance.argmin(axis=1), minlength=len(law)) / len(keys)
        deviation = np.abs(frequency - law)
        assert np.all(deviation <= 4.5 * np.sqrt(law * (1 - law) / len(keys)) + 1e-12), name


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_variance_reduction_is_unbiased_and_exact_at_the_anchor(kind, rng):
    case = Case(kind, rng)
    z, anchor = case.random(rng), case.random(rng)
    truth, at_anchor = case.gradient(z), case.gradient(anchor)
    for name, (base, (weights, law)) in feature_estimators(case, z).items():
        if name in ("full", "tau-nice fraction"):
            continue
        reduced = es.VarianceReduced.at(case.problem, anchor, base)
        each = estimates(reduced, case.problem, z, weights)
        np.testing.assert_allclose(law @ each, truth, rtol=1e-10, atol=1e-10, err_msg=name)
        # the definition, μ + ∇Ψ_S(z) − ∇Ψ_S(y)
        formula = [at_anchor + case.gradient(z, w) - case.gradient(anchor, w) for w in weights]
        np.testing.assert_allclose(each, formula, rtol=1e-9, atol=1e-9, err_msg=name)
        still = estimates(reduced, case.problem, anchor, weights)
        np.testing.assert_allclose(still, [at_anchor] * len(still), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_shared_subset_is_the_mask_with_that_subset(kind, rng):
    case = Case(kind, rng)
    z, anchor = case.random(rng), case.random(rng)
    n = case.n1
    for tau in range(1, n + 1):
        shared = es.TauNice(tau, shared=True)
        indices = np.array(list(itertools.combinations(range(n), tau)))
        weights, law = tau_nice_law(n, tau)
        each = estimates(shared, case.problem, z, indices)
        formula = [case.gradient(z, w) for w in weights]
        np.testing.assert_allclose(each, formula, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(law @ each, case.gradient(z), rtol=1e-11, atol=1e-11)
    reduced = es.VarianceReduced.at(case.problem, anchor, es.TauNice(2, shared=True))
    each = estimates(reduced, case.problem, z, np.array(list(itertools.combinations(range(n), 2))))
    np.testing.assert_allclose(each.mean(axis=0), case.gradient(z), rtol=1e-10, atol=1e-10)
    drawn = es.TauNice(2, shared=True).draw(KEY, case.problem, z)
    assert drawn.shape == (2,)
    assert len(set(np.asarray(drawn).tolist())) == 2


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_output_coordinates_are_unbiased(kind, rng):
    case = Case(kind, rng)
    z, n2 = case.random(rng), case.n2
    truth = case.gradient(z)
    for tau in range(1, n2 + 1):
        masks = subsets(n2, tau)
        each = estimates(es.OutputCoordinates(tau), case.problem, z, masks.astype(bool))
        formula = [(n2 / tau) * np.tile(m, len(truth) // n2) * truth for m in masks]
        np.testing.assert_allclose(each, formula, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(each.mean(axis=0), truth, rtol=1e-12, atol=1e-12)


def test_every_example_has_its_own_draw(rng):
    kernel = jnp.asarray(rng.normal(size=DENSE))
    problem = ss.LayerProblem(ss.Dense(kernel), jnp.asarray(rng.normal(size=(2, 8, 4))))
    z = jnp.asarray(rng.normal(size=problem.shape))
    for estimator in (
        es.TauNice(2),
        es.Bernoulli(0.5),
        es.SerialImportance(),
        es.Importance(2, by="gradient"),
    ):
        both = jax.jit(lambda z, e=estimator: (e.draw(KEY, problem, z), e(KEY, problem, z)))
        weights, whole = map(np.asarray, both(z))
        assert weights.shape == (2, 8, 4)
        assert len(np.unique((weights > 0).reshape(16, 4), axis=0)) > 1
        # row by row, the gradient is that of the example alone
        alone = ss.LayerProblem(ss.Dense(kernel), problem.inputs[1, 3])
        row = estimator.gradient(alone, z[1, 3], jnp.asarray(weights[1, 3]))
        np.testing.assert_allclose(whole[1, 3], row, rtol=1e-12, atol=1e-12)


def second_moment(case, weights, law):
    """E[H_w²] for the Hessians H_w of Ψ: E||∇Ψ(z) − ∇Ψ(z*)||² = <d, E[H_w²] d>."""
    hessians = [case.curvature(w) for w in weights]
    return sum(p * h @ h for p, h in zip(law, hessians, strict=True))


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_expected_smoothness_holds_for_all_pairs_of_points(ridge, rng):
    """2 Bregman(z, z*) = <d, H d>: the inequality for all z, z* is E[H_w²] ⪯ 𝓛 H."""
    for _ in range(3):
        case = Case("dense", rng, ridge=ridge)
        hessian = case.curvature(np.ones(case.n1))
        for name, (estimator, law) in feature_estimators(case, case.random(rng)).items():
            if "gradient" in name:
                with pytest.raises(ValueError, match="lipschitz"):
                    estimator.expected_smoothness(case.problem)
                continue
            worst = scipy.linalg.eigh(second_moment(case, *law), hessian, eigvals_only=True)[-1]
            constant = estimator.expected_smoothness(case.problem)
            assert worst <= constant * (1 + 1e-10), name
            assert constant <= 4 * worst, name  # of use
            reduced = es.VarianceReduced.at(case.problem, case.random(rng), estimator)
            assert reduced.expected_smoothness(case.problem) == constant
        for tau in range(1, case.n2 + 1):
            masks = subsets(case.n2, tau) * case.n2 / tau
            moment = np.mean([(m[:, None] * hessian).T @ (m[:, None] * hessian) for m in masks], 0)
            worst = scipy.linalg.eigh(moment, hessian, eigvals_only=True)[-1]
            constant = es.OutputCoordinates(tau).expected_smoothness(case.problem)
            assert worst <= constant * (1 + 1e-10)


def test_expected_smoothness_holds_for_feature_maps(rng):
    case = Case("conv", rng)
    hessian = case.curvature(np.ones(case.n1))
    for name, (estimator, law) in feature_estimators(case, case.random(rng)).items():
        if "gradient" not in name:
            worst = scipy.linalg.eigh(second_moment(case, *law), hessian, eigvals_only=True)[-1]
            assert worst <= estimator.expected_smoothness(case.problem) * (1 + 1e-10), name


def test_expected_smoothness_is_its_closed_form(rng):
    case = Case("dense", rng)
    n, whole = case.n1, np.linalg.norm(case.matrix, 2) ** 2
    largest = n * case.feature_norms().max()
    problem = case.problem
    for tau in range(1, n + 1):
        expected = n * (tau - 1) / (tau * (n - 1)) * whole
        expected += (n - tau) / (tau * (n - 1)) * largest + RIDGE
        np.testing.assert_allclose(es.TauNice(tau).expected_smoothness(problem), expected)
    np.testing.assert_allclose(
        es.Bernoulli(0.25).expected_smoothness(problem), whole + 3 * largest / n + RIDGE
    )
    np.testing.assert_allclose(
        es.SerialImportance().expected_smoothness(problem), case.feature_norms().sum() + RIDGE
    )
    np.testing.assert_allclose(es.Full().expected_smoothness(problem), whole + RIDGE)
    np.testing.assert_allclose(
        es.OutputCoordinates(2).expected_smoothness(problem), 1.5 * (whole + RIDGE)
    )


def test_expected_smoothness_of_a_single_feature():
    problem = ss.LayerProblem(ss.Dense(jnp.array([[3.0, 4.0]])), jnp.ones(1))
    for estimator in (es.TauNice(1), es.SerialImportance(), es.Importance(1), es.Full()):
        np.testing.assert_allclose(estimator.expected_smoothness(problem), 25.0, rtol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_separable_constants_are_an_overapproximation(kind, rng):
    """E[F(z + h_S)] ≤ F(z) + (τ/n2)(<∇F, h> + ½ Σ v_j ||h_j||²) for all z, h, as one matrix."""
    for _ in range(2):
        case = Case(kind, rng)
        hessian = case.curvature(np.ones(case.n1))
        pixels = len(hessian) // case.n2
        for tau in range(1, case.n2 + 1):
            v = np.tile(es.OutputCoordinates(tau).separable_constants(case.problem), pixels)
            masks = [np.tile(m, pixels) for m in subsets(case.n2, tau)]
            mean = np.mean([m[:, None] * hessian * m for m in masks], axis=0)
            excess = (tau / case.n2) * np.diag(v) - mean
            assert np.linalg.eigvalsh(excess)[0] >= -1e-12
        if kind == "dense":
            v = es.OutputCoordinates(1).separable_constants(case.problem)
            np.testing.assert_allclose(v, np.diag(hessian), rtol=1e-12)
            v = es.OutputCoordinates(case.n2).separable_constants(case.problem)
            np.testing.assert_allclose(v, np.linalg.eigvalsh(hessian)[-1], rtol=1e-12)


@pytest.mark.parametrize("tau", [0, 5, 0.0, 1.5, True])
def test_counts_out_of_range_are_refused(tau, rng):
    case = Case("dense", rng)
    z = jnp.zeros(3)
    for estimator in (es.TauNice, es.Importance, es.OutputCoordinates):
        with pytest.raises(ValueError, match="tau"):
            estimator(tau).draw(KEY, case.problem, z)


@pytest.mark.parametrize("q", [0.0, -0.1, 1.1])
def test_keep_probability_out_of_range_is_refused(q):
    with pytest.raises(ValueError, match="keep_probability"):
        es.Bernoulli(q)


def test_unknown_scores_are_refused():
    for estimator in (lambda by: es.Importance(2, by=by), es.SerialImportance):
        with pytest.raises(ValueError, match="'lipschitz', 'gradient'"):
            estimator("norm")


def test_shared_sampling_refuses_a_traced_count(rng):
    problem = Case("dense", rng).problem

    def draw(tau):
        return es.TauNice(tau, shared=True).draw(KEY, problem, jnp.zeros(3))

    with pytest.raises(ValueError, match="static"):
        jax.eval_shape(draw, jnp.asarray(2))


@pytest.mark.parametrize("by", ["lipschitz", "gradient"])
def test_importance_sampling_exports_for_any_batch(by, rng):
    kernel, key = jnp.asarray(rng.normal(size=(6, 4))), jax.random.key(0)

    def run(x):
        problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=0.1)
        solution = ss.prox_sg(key, problem, sampling=es.Importance(3, by=by), num_iters=2)
        return solution.value, problem.certificate(solution.value)

    (batch,) = export.symbolic_shape("batch")
    saved = export.export(jax.jit(run))(jax.ShapeDtypeStruct((batch, 6), jnp.float64))
    x = jnp.asarray(rng.normal(size=(3, 6)))
    for one, other in zip(saved.call(x), run(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
