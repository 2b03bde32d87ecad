"""The public checks find planted mistakes, and say in words what broke."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss
from stochsolvers import testing
from stochsolvers.solvers import Step

KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
X = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4)))
PROBLEM = ss.LayerProblem(ss.Dense(KERNEL), X, bias=jnp.ones(3), prior=ss.prox.L1(0.05), ridge=0.3)


class KernelMap(ss.LinearMap):
    """A dense map of three lines, to be broken."""

    in_shape, out_shape = (4,), (3,)

    def __call__(self, x):
        return x @ self.kernel


@ss.value_object
class WrongAdjoint(KernelMap):
    kernel: jax.Array

    def adjoint(self, z):
        return z @ jnp.abs(self.kernel).T


@ss.value_object
class IgnoresBatchAxes(KernelMap):
    kernel: jax.Array

    def __call__(self, x):
        return jnp.broadcast_to(x.reshape(-1, 4)[0] @ self.kernel, (*x.shape[:-1], 3))


@ss.value_object
class Affine(KernelMap):
    kernel: jax.Array

    def __call__(self, x):
        return x @ self.kernel + 1.0

    def adjoint(self, z):
        return z @ self.kernel.T


@ss.value_object
class WrongShape(KernelMap):
    kernel: jax.Array
    out_shape = (5,)


@ss.value_object
class WrongRestriction(KernelMap):
    kernel: jax.Array

    def restrict(self, indices):
        return ss.Dense(self.kernel[: len(indices)])


@ss.value_object
class WrongBound(KernelMap):
    kernel: jax.Array

    def squared_norm_bound(self):
        return 0.5 * jnp.linalg.norm(self.kernel, 2) ** 2


@ss.value_object
class WrongAbsolute(KernelMap):
    kernel: jax.Array

    def absolute(self):
        return ss.Dense(self.kernel)


@ss.value_object
class Widens(KernelMap):
    kernel: jax.Array

    def __call__(self, x):
        return x @ self.kernel * np.float64(1.0)


@ss.value_object
class StaticKernel(KernelMap):
    kernel: jax.Array = ss.static_field()


class NotAPytree(KernelMap):
    kernel = KERNEL


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (WrongAdjoint(KERNEL), r"adjoint of WrongAdjoint: expected <x, A\*\(z\)> = <A\(x\), z> = "),
        (IgnoresBatchAxes(KERNEL), r"IgnoresBatchAxes\(x\) with 1 batch axes: expected A of each"),
        (Affine(KERNEL), r"Affine\(2x − 3y\): expected 2 A\(x\) − 3 A\(y\), by linearity"),
        (WrongShape(KERNEL), r"shape of WrongShape\(x\) with 0 batch axes: expected \(5,\), got"),
        (WrongRestriction(KERNEL), r"WrongRestriction.restrict\(S\)\(x_S\): expected A\(x with"),
        (WrongBound(KERNEL), r"squared_norm_bound\(\): expected at least ‖A‖² = "),
        (WrongAbsolute(KERNEL), r"absolute\(\): expected the absolute values of the entries"),
        (Widens(KERNEL), r"dtype of Widens\(x\) in float32: expected float32, got float64"),
        (StaticKernel(KERNEL), "StaticKernel.kernel: expected an array that is traced"),
        (NotAPytree(), "NotAPytree: expected a JAX pytree"),
        (KERNEL, "expected a LinearMap"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_planted_mistakes_of_maps(A, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_linear_map(A)


@ss.value_object
class WrongDerivative(ss.Loss):
    def value(self, u, x):
        return 0.5 * (u - x) ** 2

    def derivative(self, u, x):
        return 0.9 * (u - x)


@ss.value_object
class WrongSmoothness(ss.Loss):
    smoothness = 0.2

    def value(self, u, x):
        return jax.nn.softplus(-x * u)


@ss.value_object
class WrongConjugate(ss.Loss):
    def value(self, u, x):
        return 0.5 * (u - x) ** 2

    def conjugate(self, r, x):
        return r * x + r**2


@ss.value_object
class UnboundedConjugate(ss.losses.Huber):
    """The conjugate of Huber's loss without its domain."""

    def conjugate(self, r, x):
        return r * (x + 0.5 * r)


@ss.value_object
class WrongProjection(ss.losses.Huber):
    def dual_projection(self, r, x):
        return jnp.clip(r, -0.5 * self.delta, 0.5 * self.delta)


@ss.value_object
class NotConvex(ss.Loss):
    def value(self, u, x):
        return jnp.sin(u - x)


@ss.value_object
class WrongStrongConvexity(ss.losses.Huber):
    strong_convexity = 0.5


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (WrongDerivative(), "WrongDerivative.derivative along a direction: expected the slope of"),
        (WrongSmoothness(), "WrongSmoothness.smoothness: expected at least 0.2.*, got 0.2"),
        (WrongConjugate(), r"WrongConjugate.conjugate at r = ∂ℓ\(u\): expected <r, u> − ℓ\(u\)"),
        (UnboundedConjugate(0.5), "conjugate at a dual point of random numbers: expected at least"),
        (WrongProjection(0.5), r"dual_projection\(r\): expected r where r = ∂ℓ\(u\)"),
        (NotConvex(), r"NotConvex along a segment, .* \(convexity\): expected at most that of"),
        (WrongStrongConvexity(0.5), "strong_convexity: expected at most"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_planted_mistakes_of_losses(loss, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_loss(loss, jnp.sign(X))


class AbsoluteValue(ss.Prior):
    """g(u) = ½ Σ|u|, to be broken."""

    def _value(self, u):
        return 0.5 * jnp.sum(jnp.abs(u))

    def _prox(self, v, step):
        return jnp.sign(v) * jnp.maximum(jnp.abs(v) - 0.5 * step, 0)


@ss.value_object
class HalfProx(AbsoluteValue):
    def _prox(self, v, step):
        return super()._prox(v, 0.5 * step)


@ss.value_object
class IgnoresStep(AbsoluteValue):
    def _prox(self, v, step):
        return super()._prox(v, jnp.ones_like(step))


@ss.value_object
class NoDomain(AbsoluteValue):
    """ReLU with an indicator that is 0 everywhere."""

    def _value(self, u):
        return jnp.zeros((), u.dtype)

    def _prox(self, v, step):
        return jnp.maximum(v, 0)


@ss.value_object
class WrongDual(AbsoluteValue):
    """The conjugate of |u| in the place of ½ |u|'s."""

    def _conjugate(self, w):
        return jnp.where(jnp.all(jnp.abs(w) <= 1), 0.0, jnp.inf)

    def _dual_projection(self, w, margin):
        return jnp.clip(w, margin - 1, 1 - margin)


@ss.value_object
class WrongDualProjection(AbsoluteValue):
    def _conjugate(self, w):
        return jnp.where(jnp.all(jnp.abs(w) <= 0.5 + 1e-6), 0.0, jnp.inf)


@ss.value_object
class DoubleOnly(AbsoluteValue):
    def _prox(self, v, step):
        return super()._prox(v, step).astype(jnp.float64)


@ss.value_object
class NotSeparable(AbsoluteValue):
    """Shrinks to the mean, and says that it is separable."""

    def _value(self, u):
        return 0.5 * jnp.sum((u - jnp.mean(u, -1, keepdims=True)) ** 2)

    def _prox(self, v, step):
        mean = jnp.mean(v, -1, keepdims=True)
        return (v - mean) / (1 + step) + mean


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (HalfProx(), r"HalfProx.prox\(v, η\): expected argmin ½‖u − v‖² \+ η g\(u\)"),
        (IgnoresStep(), r"IgnoresStep.prox\(v, η\): expected argmin"),
        (NoDomain(), r"NoDomain.prox\(v, η\): expected argmin"),
        (WrongDual(), r"WrongDual.conjugate at random w: expected g\(q\) \+ g\*\(w\) >= <q, w>"),
        (WrongDualProjection(), r"dual_projection\(w\): expected a point of dom g\*"),
        (DoubleOnly(), "dtype of DoubleOnly.prox of float32: expected float32, got float64"),
        (NotSeparable(), "the other entries after one has changed: expected those of before"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_planted_mistakes_of_priors(prior, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_prior(prior, (4,))


@ss.value_object
class Biased(ss.estimators.FeatureEstimator):
    """τ of n1 features, without the factor n1/τ."""

    scale: float = 1.0

    def draw(self, key, problem, z):
        return ss.sampling.tau_nice_mask(key, 2, 4, problem.batch_shape) * self.scale

    def expected_smoothness(self, problem):
        return ss.estimators.TauNice(2).expected_smoothness(problem)


@ss.value_object
class OneDraw(Biased):
    """The same mask for all examples."""

    scale: float = 2.0

    def draw(self, key, problem, z):
        mask = ss.sampling.tau_nice_mask(key, 2, 4) * self.scale
        return jnp.broadcast_to(mask, (*problem.batch_shape, 4))


@ss.value_object
class Smooth(Biased):
    """The smoothness of the full gradient."""

    scale: float = 2.0

    def expected_smoothness(self, problem):
        return problem.ridge


@ss.value_object
class PreparesAnother(Biased):
    scale: float = 2.0

    def prepare(self, problem):
        return ss.estimators.TauNice(3)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Biased(), r"mean of Biased over 4096 keys: expected ∇F\(z\) = .* within"),
        (OneDraw(), "draws of OneDraw: expected a draw for each example"),
        (Smooth(), r"Smooth.expected_smoothness: expected 𝓛 >= "),
        (PreparesAnother(), r"PreparesAnother.prepare\(problem\): expected the same estimates"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_planted_mistakes_of_estimators(estimator, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_estimator(estimator, PROBLEM)


def test_a_law_is_held_exactly():
    masks = np.array(
        [[i in pair for i in range(4)] for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    )
    law = 2.0 * masks, np.full(6, 1 / 6)
    testing.check_estimator(ss.estimators.TauNice(2), PROBLEM, law=law)
    other = 2.0 * masks[[0, 1, 2, 3, 4, 4]], np.full(6, 1 / 6)
    with pytest.raises(AssertionError, match="draws of TauNice: expected one of its 5 outcomes"):
        testing._chance.same_law("draws of TauNice", law[0], *other, 1e-9)


@ss.value_object
class TooLong(ss.StepSizeRule):
    """2.1 / L_F."""

    factor: float = 2.1

    def constant(self, problem, estimator):
        return ss.lipschitz_constant(problem.linear_map)

    def schedule(self, constant, problem):
        return lambda k: self.factor / problem.smoothness(constant)


@ss.value_object
class ReadsInputs(TooLong):
    factor: float = 0.5

    def constant(self, problem, estimator):
        return super().constant(problem, estimator) + jnp.sum(problem.inputs**2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (TooLong(), "first step of TooLong: expected at most 2/L_F = "),
        (10.0, "first step of float: expected at most 2/L_F = "),
        (ReadsInputs(), "ReadsInputs.constant at other inputs and another bias: expected the same"),
        (lambda k: 0.1 - 0.05 * k, "step of iteration 10: expected a number > 0"),
    ],
    ids=["too long", "a number", "reads inputs", "negative"],
)
def test_planted_mistakes_of_step_sizes(rule, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_step_size(rule, PROBLEM)


def test_longer_steps_than_theory_supports_are_reported():
    report = testing.check_step_size(ss.InverseLipschitz(), PROBLEM, ss.estimators.TauNice(1))
    assert report.first > report.safe
    report = testing.check_step_size(
        ss.InverseExpectedSmoothness(), PROBLEM, ss.estimators.TauNice(1)
    )
    assert report.first == pytest.approx(report.safe)


class Descent(ss.Solver):
    """Proximal gradient steps, to be broken."""

    def step(self, run, k, z, memory):
        point = z - run.step_size(k) * run.gradient(z)
        return Step(run.prox(point, k), memory, point)


@ss.value_object
class StaticNumber(Descent):
    num_iters: int = ss.static_field()
    momentum: float = ss.static_field(default=0.0)


@ss.value_object
class StaticStep(Descent):
    num_iters: int = ss.static_field()
    step_size: ss.StepSizeLike = ss.static_field(default=None)


@ss.value_object
class Recompiles(Descent):
    """Compiles a new function for every call."""

    num_iters: int = ss.static_field()

    def solve(self, key, problem, **options):
        options.pop("step_constant", None)
        return jax.jit(lambda problem: ss.Solver.solve(self, key, problem, **options))(problem)


@ss.value_object
class WrongFixedPoint(Descent):
    num_iters: int = ss.static_field()

    def step(self, run, k, z, memory):
        point = z - run.step_size(k) * run.gradient(z)
        return Step(run.problem.prior.prox(point, 2 * run.step_size(k)), memory, point)


@ss.value_object
class HidesSampling(Descent):
    """Samples where it is to be deterministic."""

    num_iters: int = ss.static_field()

    def step(self, run, k, z, memory):
        mask = ss.sampling.tau_nice_mask(jax.random.key(0), 2, 3, run.problem.batch_shape)
        point = z - run.step_size(k) * mask * run.gradient(z)
        return Step(run.prox(point, k), memory, point)


@ss.value_object
class NotSampling(Descent):
    """Says that it samples, and does not."""

    num_iters: int = ss.static_field()
    stochastic = True


@ss.value_object
class NoDerivative(Descent):
    num_iters: int = ss.static_field()

    def step(self, run, k, z, memory):
        return super().step(jax.lax.stop_gradient(run), k, z, memory)


@ss.value_object
class Raises(Descent):
    """Looks at values."""

    num_iters: int = ss.static_field()

    def solve(self, key, problem, **options):
        if not isinstance(problem.inputs, jax.core.Tracer) and jnp.any(jnp.isnan(problem.inputs)):
            raise FloatingPointError("inputs of NaN")
        return super().solve(key, problem, **options)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (StaticNumber(3), "StaticNumber.momentum: expected a number that is traced"),
        (StaticStep(3), "StaticStep.step_size: expected a field that is traced"),
        (Recompiles(3), "compilations of Recompiles.solve: expected 1 for other inputs.*, got 3"),
        (WrongFixedPoint(3), "objective after 3000 iterations of WrongFixedPoint along ∇F"),
        (HidesSampling(3), "objective after 3000 iterations of HidesSampling along ∇F"),
        (NotSampling(3), "NotSampling.solve with another key: expected another value"),
        (NoDerivative(3), r"derivative of NoDerivative.solve \(Unrolled\): expected that of diff"),
        (Raises(3), "Raises.solve at an input of NaN without jit: expected a result, got Floating"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_planted_mistakes_of_solvers(solver, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_solver(solver, PROBLEM)


class DropsBias(ss.nnx.SolverLinear):
    def problem(self, inputs, *, skip=None):
        return dataclasses.replace(super().problem(inputs, skip=skip), bias=None)


class Doubles(ss.nnx.SolverLinear):
    def __call__(self, inputs, **options):
        return 2 * super().__call__(inputs, **options)


class KeepsOldSteps(ss.nnx.SolverLinear):
    """Takes the step of its initial kernel for ever."""

    def solve(self, inputs, **options):
        self.reference = None if self.reference is None else self.reference
        options.pop("rngs", None)
        options.pop("deterministic", None)
        certify = options.pop("certify", False)
        constant = jnp.float32(1.0)
        problem = self.problem(inputs)
        return self.solver.solve(None, problem, step_constant=constant, certify=certify)


class Mixes(ss.nnx.SolverLinear):
    def __call__(self, inputs, **options):
        return super().__call__(inputs - jnp.mean(inputs, axis=0, keepdims=True), **options)


class Widened(ss.nnx.SolverLinear):
    def __call__(self, inputs, **options):
        return super().__call__(inputs, **options).astype(jnp.float64)


@jax.custom_jvp
def doubled_under_derivatives(y):
    return y


@doubled_under_derivatives.defjvp
def _(primals, tangents):
    return 2 * primals[0], 2 * tangents[0]


class OtherValues(ss.nnx.SolverLinear):
    def __call__(self, inputs, **options):
        return doubled_under_derivatives(super().__call__(inputs, **options))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherValues, r"output of OtherValues\(x\) under grad: expected the output without"),
        (
            DropsBias,
            r"derivative of DropsBias\(x\) in parameter .*bias.*: expected not 0 everywhere",
        ),
        (Doubles, "value of Doubles.solve: expected the layer's output"),
        (
            KeepsOldSteps,
            r"KeepsOldSteps\(x\) after .*: expected the solution of its problem by its",
        ),
        (Mixes, r"Mixes\(x\): expected that of each example"),
        (
            Widened,
            "dtype of output of Widened for inputs of float32: expected float32, got float64",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_mistakes_of_layers(kind, message):
    layer = kind(4, 3, solver=ss.ProxGD(2), prior=ss.prox.Zero(), rngs=nnx.Rngs(0))
    with pytest.raises(AssertionError, match=message):
        testing.check_layer(layer, X.astype(jnp.float32))


def test_planted_mistake_of_a_linen_layer():
    class DropsLinenBias(ss.linen.SolverDense):
        @nn.compact
        def solve(self, inputs, **options):
            self.param("bias", nn.initializers.zeros, (self.features,))
            kernel = self.param("kernel", self.kernel_init, (4, self.features))
            problem = ss.LayerProblem(ss.Dense(kernel), inputs, prior=self.prior)
            options = {"certify": options.get("certify", False)}
            return self.solver.solve(None, problem, deterministic=True, **options)

    layer = DropsLinenBias(3, solver=ss.ProxGD(2), prior=ss.prox.Zero())
    x = X.astype(jnp.float32)
    with pytest.raises(AssertionError, match=r"in parameter .*bias.*: expected not 0 everywhere"):
        testing.check_layer(layer, x, variables=layer.init(jax.random.key(0), x))


def one_iteration(tau, *, bias=1.0):
    def layer(key, x):
        problem = ss.LayerProblem(ss.Dense(KERNEL), x, bias=bias * jnp.ones(3))
        return ss.prox_sg(key, problem, tau=tau, step_size=1.0, num_iters=1).value

    return layer


def plain(x):
    return jax.nn.relu(x @ KERNEL + 1.0)


def with_dropout(key, x):
    return plain(ss.dropout.tau_nice_dropout(key, x, 2))


class TestEquivalence:
    def test_of_the_law_by_enumeration(self):
        testing.assert_equivalent(one_iteration(2), plain, X[0], tau=2)
        testing.assert_equivalent(one_iteration(3), plain, X[0], tau=0.75)

    def test_of_the_law_by_samples(self):
        testing.assert_equivalent(one_iteration(2), with_dropout, X[0], sampled=True)

    def test_of_outputs_and_of_flax_layers(self):
        options = {"solver": ss.ProxGD(1, step_size=1.0)}
        layer = ss.nnx.SolverLinear(4, 3, rngs=nnx.Rngs(0), **options)
        block = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
        block.kernel, block.bias = layer.kernel, layer.bias
        x = X.astype(jnp.float32)
        testing.assert_equivalent(layer, lambda x: jax.nn.relu(block(x)), x)
        module = ss.linen.SolverDense(3, **options)
        variables = {"params": {"kernel": layer.kernel[...], "bias": layer.bias[...]}}
        testing.assert_equivalent((module, variables), lambda x: jax.nn.relu(block(x)), x)
        with pytest.raises(AssertionError, match="output of SolverLinear: expected the outputs of"):
            testing.assert_equivalent(layer, block, x)

    def test_of_sampling_flax_layers(self):
        options = {"solver": ss.ProxSG(2, 1, step_size=1.0)}
        layer = ss.nnx.SolverLinear(4, 3, rngs=nnx.Rngs(0), **options)
        module = ss.linen.SolverDense(3, **options)
        params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}

        def block(x):
            return jax.nn.relu(x @ params["kernel"] + params["bias"])

        x = X[0].astype(jnp.float32)
        testing.assert_equivalent(layer, block, x, tau=2)
        testing.assert_equivalent((module, {"params": params}), block, x, tau=2)

    @pytest.mark.parametrize(
        ("layer", "options", "message"),
        [
            (one_iteration(3), {"tau": 2}, "output of layer: expected one of its 6 outcomes"),
            (one_iteration(2, bias=0.9), {"tau": 2}, "output of layer: expected one of its 6"),
            (one_iteration(3), {"sampled": True}, "expected one of the 6 outcomes of the block"),
        ],
        ids=["another rate", "another bias", "another rate, by samples"],
    )
    def test_finds_other_outcomes(self, layer, options, message):
        block = with_dropout if "sampled" in options else plain
        with pytest.raises(AssertionError, match=message):
            testing.assert_equivalent(layer, block, X[0], **options)

    @pytest.mark.parametrize("options", [{"tau": 2}, {"sampled": True}], ids=["law", "samples"])
    def test_finds_other_frequencies(self, options):
        """The first feature is kept more often than the others."""

        def layer(key, x):
            first, second = (ss.sampling.tau_nice_mask(k, 2, 4) for k in jax.random.split(key))
            mask = jnp.where(first[0], first, second)
            return plain(2.0 * mask * x)

        block = with_dropout if "sampled" in options else plain
        with pytest.raises(AssertionError, match=r"law of .*: expected .*χ².*frequency"):
            testing.assert_equivalent(layer, block, X[0], **options)


def test_the_library_does_not_need_chex(users_environment):
    program = (
        "import sys; sys.modules['chex'] = None; import stochsolvers\n"
        "try: import stochsolvers.testing\n"
        "except ImportError as error: print(error)"
    )
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, capture_output=True, text=True, env=users_environment, check=True)
    assert "pip install 'stochsolvers[testing]'" in result.stdout
