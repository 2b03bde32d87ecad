"""The contract of a linear map."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import lipschitz
from stochsolvers._typing import Array
from stochsolvers.linear_maps import LinearMap, size
from stochsolvers.problems import LayerProblem
from stochsolvers.testing import _common as common

_WRITTEN_OUT = 2**18  # entries of a matrix whose singular values are computed
_BATCHES = ((), (3,), (2, 3))


def check_linear_map(A: LinearMap) -> None:
    r"""Hold a linear map to its contract, on random numbers.

    - A(x) and A.adjoint(z) have the stated shapes, for 0, 1 and 2 batch axes, and are those of each example;
    - A(a x + b y) = a A(x) + b A(y), and <A(x), z> = <x, A.adjoint(z)>;
    - A.T is the adjoint, and A.T.T is A;
    - A.restrict(S) is A on the features of S, with traced S too;
    - in float32 results are float32; a problem in bfloat16 computes with it in float32;
    - derivatives in x and in the map's arrays are those of differences;
    - the map is a pytree, equal to itself after a round trip, and a path of its arrays compiles once;
    - `absolute` is |A|, `squared_norm_bound` is at least ‖A‖², and so is the upper end of
      `operator_bracket`, whose lower end is at most ‖A‖², by numpy's SVD (for up to 2¹⁸ entries).

    Args:
      A: the map; computed with in float64, but for the dtypes.

    Raises:
      AssertionError: in words, with the numbers.
    """
    name = type(A).__name__
    common.require(isinstance(A, LinearMap), name, "a LinearMap", repr(A))
    common.passes_as_a_value(name, A)
    with common.float64():
        wide = A.astype(jnp.dtype(jnp.float64))
        _check_shapes(name, wide)
        _check_products(name, wide)
        _check_derivatives(name, wide)
        _check_dtypes(name, A)
        if size(A) <= _WRITTEN_OUT:
            _check_norms(name, wide)


def _check_shapes(name: str, A: LinearMap) -> None:
    for what in ("in_shape", "out_shape"):
        shape = getattr(A, what)
        fine = isinstance(shape, tuple) and all(isinstance(n, int) and n > 0 for n in shape)
        common.require(fine and shape, f"{name}.{what}", "a tuple of integers >= 1", shape)
    for batch in _BATCHES:
        for call, before, after, label in (
            (A, A.in_shape, A.out_shape, f"{name}(x)"),
            (A.adjoint, A.out_shape, A.in_shape, f"{name}.adjoint(z)"),
        ):
            what = f"{label} with {len(batch)} batch axes"
            argument = jax.ShapeDtypeStruct((*batch, *before), jnp.float64)
            result = common.attempt(what, jax.eval_shape, call, argument)
            common.same_shape(what, result, (*batch, *after))


def _per_example(function: Any, batch: tuple[int, ...]) -> Any:
    for _ in batch:
        function = jax.vmap(function)
    return function


def _check_products(name: str, A: LinearMap) -> None:
    n1 = A.in_features
    kept = jnp.asarray(np.random.default_rng(5).permutation(n1)[: max(n1 - 1, 1)])

    def products(A: LinearMap, x: Array, y: Array, z: Array, kept: Array) -> dict[str, Any]:
        part, one = A.restrict(kept), (0, 0)
        outside = jnp.zeros_like(x[one]).at[..., kept].set(x[one][..., kept])
        return {
            "A": [A(x[(0,) * (2 - len(b))]) for b in _BATCHES],
            "each A": [_per_example(A, b)(x[(0,) * (2 - len(b))]) for b in _BATCHES],
            "A*": [A.adjoint(z[(0,) * (2 - len(b))]) for b in _BATCHES],
            "each A*": [_per_example(A.adjoint, b)(z[(0,) * (2 - len(b))]) for b in _BATCHES],
            "sum": (A(2.0 * x - 3.0 * y), 2.0 * A(x) - 3.0 * A(y)),
            "zero": A(jnp.zeros_like(x)),
            "inner": (jnp.vdot(A(x[one]), z[one]), jnp.vdot(x[one], A.adjoint(z[one]))),
            "T": (A.T(z[one]), A.T.adjoint(x[one]), A.T.T(x[one])),
            "part": (part(x[one][..., kept]), A(outside)),
            "part*": (part.adjoint(z[one]), A.adjoint(z[one])[..., kept]),
        }

    shape = (2, 3)
    x, y = (common.normal(seed, (*shape, *A.in_shape)) for seed in (1, 2))
    z = common.normal(3, (*shape, *A.out_shape))
    path = [(common.scaled(A, f), x, y, z, kept) for f in (1.0, 2.0, 0.5)]
    got = jax.tree.map(np.asarray, common.traced_once(f"the products of {name}", products, path)[0])
    close = common.close
    for batch, mine, each in zip(_BATCHES, got["A"], got["each A"], strict=True):
        words = "A of each example (leading axes are batch axes)"
        close(f"{name}(x) with {len(batch)} batch axes", mine, each, words=words)
    close(f"{name}(2x − 3y)", *got["sum"], words="2 A(x) − 3 A(y), by linearity")
    common.require(got["zero"] == 0, f"{name}(0)", 0, got["zero"].max())
    left, right = got["inner"]
    unit = np.linalg.norm(got["A"][0]) * np.linalg.norm(np.asarray(z)[0, 0])
    fine = abs(left - right) <= common.tolerance(left) * unit + 1e-300
    words = f"<x, A*(z)> = <A(x), z> = {left:.10g}"
    common.require(fine, f"the adjoint of {name}", words, f"{right:.10g}")
    for batch, mine, each in zip(_BATCHES, got["A*"], got["each A*"], strict=True):
        words = "A* of each example (leading axes are batch axes)"
        close(f"{name}.adjoint(z) with {len(batch)} batch axes", mine, each, words=words)
    close(f"{name}.T(z)", got["T"][0], got["A*"][0], words="A.adjoint(z)")
    close(f"{name}.T.adjoint(x)", got["T"][1], got["A"][0], words="A(x)")
    close(f"{name}.T.T(x)", got["T"][2], got["A"][0], words="A(x)")
    close(f"{name}.restrict(S)(x_S)", *got["part"], words="A(x with zeros outside S)")
    close(f"{name}.restrict(S).adjoint(z)", *got["part*"], words="A*(z) on S")
    eager = common.attempt(f"{name}(x) without jit", A, x[0, 0])
    close(f"{name}(x) without jit", eager, got["A"][0], words="that of jit")


def _check_derivatives(name: str, A: LinearMap) -> None:
    """<A(x), z> in x and in the arrays of A, along random directions."""
    real, rest = _split(A)
    x, z = common.normal(1, A.in_shape), common.normal(3, A.out_shape)

    def product(operands):
        leaves, x = operands
        return jnp.vdot(rest(leaves)(x), z)

    point = (real, x)
    way = common.directions(point, 7)

    @jax.jit
    def derivatives(point, way):
        gradient = jax.grad(product)(point)
        parts = jax.tree.map(jnp.vdot, gradient, way)
        return parts, [
            common.slope(lambda p, i=i: product((p, x) if i == 0 else (real, p)), point[i], way[i])
            for i in (0, 1)
        ]

    parts, slopes = common.attempt(f"derivative of {name}", derivatives, point, way)
    close = common.close
    words = "that of differences"
    close(f"derivative of {name}(x) in x", parts[1], slopes[1], rtol=1e-6, words=words)
    if real:
        total, expected = sum(parts[0]), slopes[0]
        size = max([abs(expected), *map(abs, parts[0])])
        fine = abs(total - expected) <= 1e-5 * size + 1e-9
        what = f"derivative of {name}(x) in the arrays of {name}"
        common.require(fine, what, f"{words}, {expected:.8g}", f"{total:.8g}")


def _split(A: LinearMap) -> tuple[list[Array], Any]:
    """The real arrays of a map, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(A)
    where = [i for i, leaf in enumerate(leaves) if common.is_real(leaf)]

    def join(real):
        mixed = list(leaves)
        for i, leaf in zip(where, real, strict=True):
            mixed[i] = leaf
        return jax.tree.unflatten(structure, mixed)

    return [leaves[i] for i in where], join


def _check_dtypes(name: str, A: LinearMap) -> None:
    """float32 by itself; bfloat16 in a problem, which computes with it in float32."""
    x, z = common.normal(1, A.in_shape), common.normal(3, A.out_shape)

    @jax.jit
    def both(A, x, z):
        return A(x), A.adjoint(z)

    exact = both(A.astype(jnp.dtype(jnp.float64)), x, z)
    what, narrow = f"{name} in float32", A.astype(jnp.dtype(jnp.float32))
    got = common.attempt(what, both, narrow, *common.cast((x, z), jnp.float32))
    rtol = 20 * math.sqrt(size(A)) * float(jnp.finfo(jnp.float32).eps)
    for label, mine, theirs in zip(("(x)", ".adjoint(z)"), got, exact, strict=True):
        what = f"{name}{label} in float32"
        common.same_dtype(what, mine, jnp.float32)
        common.close(what, mine, theirs, rtol=rtol, words="about that of float64")

    def gradient(A, x):
        problem = LayerProblem(A, x)
        return problem.gradient(jnp.zeros(problem.shape, problem.dtype))

    what = f"∇F(0) of a problem with {name} in bfloat16"
    low = A.astype(jnp.dtype(jnp.bfloat16)), x.astype(jnp.bfloat16)
    got = common.attempt(what, jax.jit(gradient), *low)
    common.same_dtype(what, got, jnp.float32)
    rtol = 4 * math.sqrt(size(A)) * float(jnp.finfo(jnp.bfloat16).eps)
    common.close(what, got, -exact[0], rtol=rtol, words="about that of float64, −A(x)")


def _check_norms(name: str, A: LinearMap) -> None:
    inputs = math.prod(A.in_shape)

    @jax.jit
    def written_out(A):
        units = jnp.eye(inputs).reshape(inputs, *A.in_shape)
        return jax.vmap(A)(units).reshape(inputs, -1)

    matrix = np.asarray(written_out(A))
    squared = float(np.linalg.norm(matrix, 2) ** 2)
    few = 1e-10 * squared
    bound = common.attempt(f"{name}.squared_norm_bound()", A.squared_norm_bound)
    if bound is not None:
        what = f"{name}.squared_norm_bound()"
        common.require(bound >= squared - few, what, f"at least ‖A‖² = {squared:.10g}", bound)
    absolute = common.attempt(f"{name}.absolute()", A.absolute)
    if absolute is not None:
        entries = common.attempt(f"{name}.absolute()", written_out, absolute)
        words = "the absolute values of the entries of A"
        common.close(f"{name}.absolute()", entries, np.abs(matrix), words=words)
    lower, upper = common.attempt(f"operator_bracket({name})", lipschitz.operator_bracket, A)
    common.require(
        (lower <= squared + few) & (squared - few <= upper),
        f"operator_bracket({name})",
        f"ends around ‖A‖² = {squared:.10g}",
        f"{lower:.10g} and {upper:.10g}",
    )
    what = f"lipschitz_constant({name}, grid='padded')"
    constant = common.attempt(what, lipschitz.lipschitz_constant, A, grid="padded")
    common.require(constant >= squared * (1 - 1e-8), what, f"at least {squared:.10g}", constant)
