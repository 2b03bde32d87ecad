"""The convex problem of one layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import automatic, batch_spec, is_explicit
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz import lipschitz_constant
from stochsolvers.losses import Loss
from stochsolvers.problems import _certificate
from stochsolvers.problems._objective import Objective
from stochsolvers.problems._products import Products
from stochsolvers.prox import Prior


@value_object
class LayerProblem(Objective):
    r"""The convex problem of one layer, for a batch of inputs.

        minimise_z  Σ_i ℓ((A* z)_i, x_i) − <b, z> + (λ/2)||z||² + g(z)

    Args:
      linear_map: A, a `Dense`, a `Conv` or any other `LinearMap`.
      inputs: x, shape (*batch, *A.in_shape): (*batch, n1) for `Dense`, (*batch, H, W, n1) for `Conv`.
      loss: ℓ, a member of `stochsolvers.losses` or a `Loss` of your own; ½ (u − x)² by default.
      bias: b, anything that broadcasts to the outputs: (n2,) for a layer's bias, a whole activation
        for a skip connection. None is zero.
      prior: g, a member of `stochsolvers.prox`.
      ridge: λ ≥ 0.

    Arrays below float32 are computed with in float32.

    Raises:
      ValueError: at trace time, for shapes and dtypes that do not fit, factors that are no maps, losses
        and priors, or a negative ridge.

    Example:
      >>> A, x = ss.Dense(jnp.array([[1.0], [1.0]])), jnp.array([2.0, 4.0])
      >>> problem = ss.LayerProblem(A, x, prior=ss.prox.L1(1.0))
      >>> float(problem.objective(jnp.array([2.0])))  # ½(0² + 2²) + 2
      4.0

    References:
      Bibi et al. 2019, eq. 1 and 5.
    """

    def certificate(
        self,
        z: Array,
        *,
        squared_norm: Scalar | None = None,
        strong_convexity: Scalar | None = None,
    ) -> Array:
        r"""A certified optimality gap: P(z) − min P ≤ certificate(z), for each example.

        The smallest of three bounds. With m-strongly convex ℓ (1 for squares) and μ = λ + m λ_min(A A*) >
        0, F lies above a paraboloid of curvature μ, whose sum with g is least at one proximal step u:

            g(z) − g(u) + <∇F(z), z − u> − (μ/2) ||u − z||²,       u = prox_{g/μ}(z − ∇F(z)/μ).

        The others need no curvature. They are Fenchel gaps at dual points r + d, r = ∂ℓ(A* z, x),

            Σ_i [ℓ(u_i, x_i) + ℓ*(r_i + d_i, x_i) − u_i (r_i + d_i)] + g(z) + g*(w) − <w, z>,

        u = A* z and w = −∇F(z) − A d ∈ dom g*; the sum is ½ ||d||² for squares. Once at shrunken points, d
        = −δ r, and, where g* is infinite somewhere and the bounds so far may be far above the gap, with a
        small d found by accelerated gradient steps. All go to zero with the gap, to the round-off of ∇F times
        the size of z, which is added to them: the value is never below the gap of the arrays as they are, if
        the losses are accurate (see `Loss`) and a map too large to be written out as well (see `LinearMap`).
        A* z and A r are summed in blocks of some 32 products, whose sums go on in twice the precision. The
        value is +inf where z is infeasible, and where no dual point was found, as when the problem is
        unbounded below.

        Args:
          z: shaped as the outputs.
          squared_norm: an upper bound on ‖A‖², where it is known; else `lipschitz_constant` on the padded
            grid. With a number below ‖A‖² nothing is promised.
          strong_convexity: a lower bound on λ_min(A A*), where it is known; else that of the function of this
            name.

        Returns:
          shape (*batch,), in units of the objective. Not differentiable.

        References:
          Nesterov 2018, theorem 2.1.10 (first bound); Rockafellar 1970, section 31 (the others).
        """
        z = self._variable(z)
        known = {"squared_norm": squared_norm, "strong_convexity": strong_convexity}
        return self.certifier(**known)(z)

    def certifier(
        self,
        *,
        squared_norm: Scalar | None = None,
        strong_convexity: Scalar | None = None,
    ) -> "Certifier":
        """z ↦ certificate(z), with ‖A‖², λ_min(A A*) and whatever else does not depend on z computed once.

        Args:
          squared_norm: as in `certificate`.
          strong_convexity: as in `certificate`.
        """
        known = self._known(squared_norm, strong_convexity)
        problem = lax.stop_gradient(self)
        products, convexity = automatic(_constants, jax.sharding.PartitionSpec(), problem, *known)
        return Certifier(problem, products, convexity)

    def _known(self, *numbers: Scalar | None) -> tuple[Array | None, ...]:
        return tuple(None if n is None else jnp.asarray(n, self.dtype) for n in numbers)

    def _certified(self, function: Callable[..., Array], *operands: Any, z: Array) -> Array:
        spec = batch_spec(self.inputs, len(self.batch_shape)) if is_explicit() else None
        operands = jax.tree.map(lax.stop_gradient, (self, *operands, self._variable(z)))
        return automatic(function, spec, *operands)

    def normalized(self, squared_norm: Scalar | None = None) -> "NormalizedProblem":
        r"""The problem in units in which ∇F has the Lipschitz constant 1.

        With L = L_ℓ ‖A‖² + λ and F₀ the smooth part without the bias, F(z) = L F₀(z/L) − <b, z>: for squares

            the map A/√L, the inputs √L x, the ridge λ/L,   b and g as they are.

        The default step is then 1, and the first iterate from zero is prox_g(A x + b), the plain layer, for
        every prior; all further iterations apply the same activation prox_g, where in the paper's scaling it
        is prox_{g/L}. For other losses it is the map A/L with the loss L ℓ, and the first iterate is
        prox_g(b − A ∂ℓ(0, x)). Where L overflows, all is NaN.

        Args:
          squared_norm: ‖A‖²; by default `lipschitz_constant`, on the layer's grid. Derivatives pass through.
        """
        if squared_norm is None:
            squared_norm = lipschitz_constant(self.linear_map)
        return NormalizedProblem(self, self.smoothness(jnp.asarray(squared_norm, self.dtype)))


_constants = jax.jit(_certificate.constants)
_bound = jax.jit(_certificate.bound)


@value_object
class Certifier:
    """z ↦ a certified gap of each example, made by `LayerProblem.certifier`."""

    problem: LayerProblem
    products: Products
    convexity: Array | None
    interval: ClassVar[int] = 10

    @property
    def smoothness(self) -> Array:
        """L_F, a Lipschitz constant of ∇F."""
        return self.problem.smoothness(self.products.constant)

    def __call__(self, z: Array) -> Array:
        """The certificate of z, shape (*batch,)."""
        return self.problem._certified(_bound, self.products, self.convexity, z=z)


@value_object
class NormalizedProblem(LayerProblem):
    """A problem in normalised units, as `LayerProblem.normalized` makes it.

    Its first iterate is the plain layer's output to the last digit. Its factors follow from its two
    arguments: `dataclasses.replace(problem, plain=...)` is the same for other inputs or another map.

    Args:
      plain: the problem before it is normalised.
      scale: L, an upper bound on the Lipschitz constant of its gradient.
    """

    linear_map: LinearMap = dataclasses.field(init=False)
    inputs: Array = dataclasses.field(init=False)
    _: dataclasses.KW_ONLY
    loss: Loss = dataclasses.field(init=False)
    bias: Array | None = dataclasses.field(init=False)
    prior: Prior = dataclasses.field(init=False)
    ridge: Scalar = dataclasses.field(init=False)
    plain: LayerProblem = dataclasses.field(kw_only=False)
    scale: Array = dataclasses.field(kw_only=False)

    def __post_init__(self):
        plain, smoothness = self.plain, self.scale
        _checks.instance("plain of NormalizedProblem", plain, LayerProblem, "a LayerProblem")
        _checks.floating("scale of NormalizedProblem", smoothness)
        _checks.rank("scale of NormalizedProblem", smoothness, 0)
        _checks.held_by("scale of NormalizedProblem", smoothness, plain.dtype)
        scale = jnp.where(jnp.isfinite(smoothness) & (smoothness > 0), smoothness, 1.0)
        # a zero map has no scale; one that overflows must not pass for zero
        divisor = jnp.where(jnp.isfinite(smoothness), scale, jnp.nan)
        if plain.is_quadratic:
            linear_map, loss = plain.linear_map / jnp.sqrt(divisor), plain.loss
            inputs = jnp.sqrt(scale) * plain.inputs
        else:
            linear_map, inputs, loss = plain.linear_map / divisor, plain.inputs, scale * plain.loss
        for name, factor in (
            ("linear_map", linear_map),
            ("inputs", inputs),
            ("loss", loss),
            ("bias", plain.bias),
            ("prior", plain.prior),
            ("ridge", plain.ridge / scale),
            ("scale", scale),
        ):
            object.__setattr__(self, name, factor)
        super().__post_init__()

    def data_gradient_at_zero(self) -> Array:
        """That of the plain problem, to which it is equal."""
        return self.plain.data_gradient_at_zero()

    def squared_norm(self) -> Array:
        """‖A‖² with L_ℓ ‖A‖² + λ = 1 exactly, if the scale is that of the plain problem."""
        return (jnp.ones((), self.dtype) - self.ridge) / self.loss.smoothness

    def normalized(self, squared_norm: Scalar | None = None) -> "NormalizedProblem":
        """The plain problem, normalised."""
        return self.plain.normalized(squared_norm)
