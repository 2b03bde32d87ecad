"""General contractions of activations with a kernel."""

import math
import string
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.linear_maps._base import LinearMap, with_kernel_scaled


class Labels(NamedTuple):
    """The labels of an equation by where they stand.

    Attributes:
      x, kernel, out: of the three arrays, in their order, without the dots.
      groups: in all three.
      contracted: in x and the kernel.
      new: in the kernel and the output.
      copies: in x and the output.
      summed: in x alone.
      kernel_summed: in the kernel alone.
    """

    x: str
    kernel: str
    out: str
    groups: str
    contracted: str
    new: str
    copies: str
    summed: str
    kernel_summed: str


@value_object
class Contraction(LinearMap):
    r"""x ↦ einsum(equation, x, kernel), as of Flax's `Einsum`, `LinearGeneral` and `DenseGeneral`.

    For labels g, c, n, p of the four kinds below

        A(x)[g, p, n] = Σ_c x[g, p, c] kernel[g, c, n],

    with axes in the equation's order: a block diagonal matrix, one block for each g, repeated for each p.

    | a label in | is |
    |---|---|
    | x, kernel and output | a group |
    | x and kernel | contracted |
    | kernel and output | new |
    | x and output | a copy: the same map for each of its positions |
    | x alone, or the kernel alone | summed over |

    Args:
      equation: as "...d,dhk->...hk" for `jnp.einsum`, x first. Leading dots of x and the output stand for
        batch axes, which every map has: they may be left out.
      kernel: floating-point array with the axes that the equation names.
      in_shape: of one input, without batch axes, as the equation names them.

    Raises:
      ValueError: at trace time, for equations of another kind, and shapes that do not fit.
    """

    equation: str = static_field()
    kernel: Array
    in_shape: tuple[int, ...] = static_field()

    def __post_init__(self):
        _checks.floating("kernel of Contraction", self.kernel)
        object.__setattr__(self, "kernel", jnp.asarray(self.kernel))
        labels = _parsed(self.equation)
        equation = f"{labels.x},{labels.kernel}->{labels.out}"
        object.__setattr__(self, "equation", equation)
        _checks.rank(f"kernel of Contraction {equation}", self.kernel, len(labels.kernel))
        shape = _checks.counts(f"in_shape of Contraction {equation}", self.in_shape, len(labels.x))
        object.__setattr__(self, "in_shape", shape)
        sizes = dict(zip(labels.kernel, self.kernel.shape, strict=True))
        expected = tuple(sizes.get(label, n) for label, n in zip(labels.x, shape, strict=True))
        if shape != expected:
            _checks.fail(f"in_shape of Contraction {equation}", f"{expected}", shape)

    @property
    def labels(self) -> Labels:
        """The labels by their kinds."""
        return _parsed(self.equation)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of one output, without batch axes."""
        sizes = self._sizes
        return tuple(sizes[label] for label in self.labels.out)

    @property
    def _sizes(self) -> dict[str, int]:
        x, kernel = self.labels[:2]
        return dict(zip(x + kernel, (*self.in_shape, *self.kernel.shape), strict=True))

    def __call__(self, x: Array) -> Array:
        """A(x), shape (..., *in_shape) to (..., *out_shape)."""
        _checks.trailing("argument of Contraction", x, self.in_shape)
        labels = self.labels
        return jnp.einsum(f"...{labels.x},{labels.kernel}->...{labels.out}", x, self.kernel)

    def adjoint(self, z: Array) -> Array:
        """A*(z), shape (..., *out_shape) to (..., *in_shape)."""
        _checks.trailing("argument of Contraction.adjoint", z, self.out_shape)
        labels = self.labels
        kept = "".join(label for label in labels.x if label not in labels.summed)
        x = jnp.einsum(f"...{labels.out},{labels.kernel}->...{kept}", z, self.kernel)
        batch = x.ndim - len(kept)
        x = jnp.expand_dims(x, [batch + labels.x.index(label) for label in labels.summed])
        return jnp.broadcast_to(x, (*x.shape[:batch], *self.in_shape))

    def restrict(self, indices: Array) -> LinearMap:
        """A on a subset S of input features, the last axis, x_S ↦ Σ_{i∈S} A_i x_i.

        Args:
          indices: integer array (τ,), may be traced.
        """
        labels = self.labels
        if labels.x[-1] not in labels.contracted:
            return super().restrict(indices)
        part = jnp.take(self.kernel, indices, labels.kernel.index(labels.x[-1]))
        return Contraction(self.equation, part, (*self.in_shape[:-1], indices.shape[0]))

    def restrict_outputs(self, indices: Array) -> LinearMap:
        """x ↦ A(x)_S for a subset S of output features, the last axis.

        Args:
          indices: integer array (τ,), may be traced.
        """
        labels = self.labels
        if labels.out[-1] not in labels.new:
            return super().restrict_outputs(indices)
        part = jnp.take(self.kernel, indices, labels.kernel.index(labels.out[-1]))
        return Contraction(self.equation, part, self.in_shape)

    def scaled(self, factor: Scalar) -> "Contraction":
        """The map with the kernel c W."""
        return with_kernel_scaled(self, factor)

    def absolute(self) -> "Contraction":
        """|A|."""
        labels = self.labels
        kept = "".join(label for label in labels.kernel if label not in labels.kernel_summed)
        kernel = jnp.abs(jnp.einsum(f"{labels.kernel}->{kept}", self.kernel))
        return Contraction(f"{labels.x},{kept}->{labels.out}", kernel, self.in_shape)

    def blocks(self) -> Array:
        r"""The matrices of which A's own consists, shape (groups, contracted, new).

        A is block diagonal with these blocks, each as often as there are copies: up to that multiplicity
        its singular values are theirs, ||A|| = max_g ||B_g||, and x ↦ x B_g. Axes of x that are summed over
        count as contracted: the rows of B_g are repeated.
        """
        labels, sizes = self.labels, self._sizes
        groups, contracted, new = (
            math.prod(sizes[label] for label in part)
            for part in (labels.groups, labels.contracted, labels.new)
        )
        order = labels.groups + labels.contracted + labels.new
        blocks = jnp.einsum(f"{labels.kernel}->{order}", self.kernel)
        copies = math.prod(sizes[label] for label in labels.summed)
        blocks = blocks.reshape(groups, 1, contracted, new)
        return jnp.broadcast_to(blocks, (groups, copies, contracted, new)).reshape(groups, -1, new)


def dense_general(
    kernel: Array,
    in_shape: tuple[int, ...],
    *,
    axis: int | Iterable[int] = -1,
    batch_axis: int | Iterable[int] = (),
) -> Contraction:
    r"""The `Contraction` of Flax's `LinearGeneral` and `DenseGeneral`.

        A(x)[g, p, n] = Σ_c x[..., c, ...] kernel[g, c, n],

    c over the axes `axis`, g over `batch_axis`, p over the input's other axes.

    Args:
      kernel: shape (*groups, *contracted, *new).
      in_shape: of one input, without leading batch axes but for those of `batch_axis`.
      axis: the contracted axes of `in_shape`, as Flax sorts them; negative ones count from the end.
      batch_axis: the leading axes 0, 1, … of `in_shape` for each position of which the kernel has a
        matrix of its own; a mapping from axes to sizes is accepted too.

    Raises:
      ValueError: at trace time, for axes and shapes that do not fit.
    """
    _checks.floating("kernel of dense_general", kernel)
    in_shape = _checks.shape("in_shape of dense_general", in_shape)
    groups = _axes("batch_axis of dense_general", batch_axis)
    ndim, contracted_axes = len(in_shape), _axes("axis of dense_general", axis)
    if groups != list(range(len(groups))):
        _checks.fail("batch_axis of dense_general", "leading axes 0, 1, ...", groups)
    within = [a for a in contracted_axes if -ndim <= a < ndim]
    axes = sorted({a % ndim for a in within} - set(groups))
    if len(axes) != len(contracted_axes):
        expected = f"distinct axes of in_shape {tuple(in_shape)} that are not in batch_axis"
        _checks.fail("axis of dense_general", expected, axis)
    num_new = jnp.ndim(kernel) - len(groups) - len(axes)
    if num_new < 0:
        expected = f"at least {len(groups) + len(axes)} axes"
        _checks.fail("shape of kernel of dense_general", expected, jnp.shape(kernel))
    x, new = string.ascii_letters[:ndim], string.ascii_letters[ndim : ndim + num_new]
    contracted = "".join(x[a] for a in axes)
    kept = "".join(label for label in x if label not in contracted)
    return Contraction(f"{x},{x[: len(groups)]}{contracted}{new}->{kept}{new}", kernel, in_shape)


def _axes(what: str, axis: int | Iterable[int]) -> list[int]:
    """One axis or several as a list; the keys of a mapping."""
    if isinstance(axis, str | type) or not isinstance(axis, int | np.integer | Iterable):
        _checks.fail(what, "integers", _checks.named(axis))
    several = [axis] if isinstance(axis, int | np.integer) else list(axis)
    return [_checks.count(what, a, minimum=-99) for a in several]


def _parsed(equation: str) -> Labels:
    """The labels of "x,kernel->out".

    Raises:
      ValueError: for equations that are not of this kind.
    """
    what = "equation of Contraction"
    if not isinstance(equation, str):
        _checks.fail(what, "a string", type(equation).__name__)
    operands, arrow, out = equation.replace(" ", "").partition("->")
    x, comma, kernel = operands.partition(",")
    if not arrow or not comma:
        _checks.fail(what, "'x,kernel->output' with all labels", repr(equation))
    if x.startswith("...") != out.startswith("..."):
        _checks.fail(what, "leading dots in x and the output, or in neither", repr(equation))
    x, out = x.removeprefix("..."), out.removeprefix("...")
    letters = set(string.ascii_letters)
    for labels in (x, kernel, out):
        if not set(labels) <= letters:
            _checks.fail(what, "letters, and dots that lead x and the output", repr(equation))
        if len(set(labels)) != len(labels):
            _checks.fail(what, "no label twice in one array", repr(equation))
    if not x or not out:
        _checks.fail(what, "at least one label in x and in the output", repr(equation))
    if not set(out) <= set(x + kernel):
        _checks.fail(what, "output labels that x or the kernel has", repr(equation))

    def standing(order: str, *, in_x: bool, in_kernel: bool, in_out: bool) -> str:
        places = in_x, in_kernel, in_out
        return "".join(a for a in order if (a in x, a in kernel, a in out) == places)

    return Labels(
        x,
        kernel,
        out,
        groups=standing(x, in_x=True, in_kernel=True, in_out=True),
        contracted=standing(x, in_x=True, in_kernel=True, in_out=False),
        new=standing(kernel, in_x=False, in_kernel=True, in_out=True),
        copies=standing(x, in_x=True, in_kernel=False, in_out=True),
        summed=standing(x, in_x=True, in_kernel=False, in_out=False),
        kernel_summed=standing(kernel, in_x=False, in_kernel=True, in_out=False),
    )
