"""Lipschitz constants of VGG16's convolutions, against the literal formula in JAX, numpy and torch.

    python -m benchmarks.lipschitz

The literal formula is lemma 2 as it is printed: the DFT of the kernel on the layer's grid, then the
eigenvalues of Â Âᴴ at every frequency. Two sets of kernels: He-normal ones, and smooth ones whose
taps and channels decay as those of trained networks do.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from benchmarks import measure
from benchmarks.record import Figure, Goal, Options, main

VGG16 = (
    *((3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8)),
    *((256, 256, 8), (256, 512, 4), (512, 512, 4), (512, 512, 4), (512, 512, 2), (512, 512, 2)),
    (512, 512, 2),
)
"""Input and output channels, and pixels along an axis, of the 13 convolutions at CIFAR's size."""
PAUSE = 0.1
"""Seconds: right after numpy's side a call of ours took up to 1.5 times as long as it takes alone. The first
call after the pause takes longer, too, so that a sample is of several."""
QUICK = ((3, 8, 8), (8, 16, 4))


@jax.jit
def literal(kernel: jax.Array) -> jax.Array:
    """Lemma 2 in jax.numpy, of a kernel on its torus."""
    spectrum = jnp.fft.fft2(kernel, axes=(0, 1))
    gram = jnp.einsum("uvij,uvik->uvjk", spectrum, spectrum.conj(), precision="highest")
    return jnp.max(jnp.linalg.eigh(gram)[0])


def in_numpy(kernel: np.ndarray) -> float:
    """Lemma 2 by singular values, as Sedghi et al. print it, of a kernel on its torus."""
    spectrum = np.fft.fft2(kernel, axes=(0, 1))
    return float(np.linalg.svd(spectrum, compute_uv=False).max() ** 2)


def in_torch(kernel: Any, *, singular_values: bool) -> float:
    """Half the spectrum, then singular values or the eigenvalues of the smaller Gram matrix."""
    torch: Any = importlib.import_module("torch")

    spectrum = torch.fft.rfft2(kernel.movedim((0, 1), (2, 3))).movedim((2, 3), (0, 1))
    if singular_values:
        return float(torch.linalg.svdvals(spectrum).max() ** 2)
    if spectrum.shape[-2] > spectrum.shape[-1]:
        spectrum = spectrum.mT
    return float(torch.linalg.eigvalsh(spectrum @ spectrum.mH).max())


def on_torus(kernel: np.ndarray, pixels: int) -> np.ndarray:
    """The kernel in the corner of a grid; taps beyond a grid smaller than the kernel wrap around."""
    torus = np.zeros((pixels, pixels, *kernel.shape[2:]), kernel.dtype)
    rows = np.arange(len(kernel)) % pixels
    np.add.at(torus, (rows[:, None], rows), kernel)
    return torus


def he_normal(rng: np.random.Generator, n1: int, n2: int) -> np.ndarray:
    """A kernel as it is initialised."""
    return rng.standard_normal((3, 3, n1, n2)) * np.sqrt(2.0 / (9 * n1))


def smooth(rng: np.random.Generator, n1: int, n2: int) -> np.ndarray:
    """A kernel with singular values that decay over channels, and taps that decay from the centre."""
    rank = min(n1, n2)
    left = np.linalg.qr(rng.standard_normal((n1, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((n2, rank)))[0]
    channels = (left / np.arange(1, rank + 1) ** 0.5) @ right.T
    taps = np.outer((0.5, 1.0, 0.5), (0.5, 1.0, 0.5))[..., None, None]
    return taps * (channels + 0.3 * he_normal(rng, n1, n2))


def flops(layers: Sequence[tuple[int, int, int]]) -> float:
    """Operations where no frequency can be left out: a Gram matrix and a Cholesky factor for each of a half.

    Three real products and four factorisations' worth for a complex block, one of each for a real one.
    """
    total = 0.0
    for n1, n2, pixels in layers:
        n, m = min(n1, n2), max(n1, n2)
        num_real = 4 if pixels % 2 == 0 else 1
        num_complex = (pixels**2 - num_real) // 2
        total += (3 * num_complex + num_real) * 2.0 * n**2 * m
        total += (4 * num_complex + num_real) * 2.0 / 3.0 * n**3
    return total


def benchmark(options: Options) -> Sequence[Figure]:
    """Lipschitz constants of VGG16's 13 convolutions at CIFAR's size, in float32."""
    layers = QUICK if options.quick else VGG16
    return [
        *_family("He-normal", he_normal, layers, options.rounds),
        *_family("smooth", smooth, layers, options.rounds),
        *_zero_padded(layers),
    ]


def _family(
    name: str, draw: Callable[..., np.ndarray], layers: Sequence[Any], rounds: int
) -> Iterator[Figure]:
    fast, bracket = ss.lipschitz_constant, ss.lipschitz_bracket
    rng = np.random.default_rng(0)
    detail, errors, widths, ratios = [], [], [], []
    kernels: dict[tuple[int, int, int], np.ndarray] = {}
    medians: dict[tuple[int, int, int], dict[str, float]] = {}
    for n1, n2, pixels in dict.fromkeys(layers):
        kernel = draw(rng, n1, n2).astype(np.float32)
        kernels[n1, n2, pixels] = kernel
        A = ss.Conv(jnp.asarray(kernel), (pixels, pixels))
        exact = in_numpy(on_torus(kernel.astype(np.float64), pixels))
        found, (lower, upper) = float(fast(A)), tuple(map(float, bracket(A)))
        errors.append(abs(found - exact) / exact)
        widths.append((upper - lower) / exact)
        assert lower <= exact <= upper, (n1, n2, pixels, lower, exact, upper)
        sides = _sides(A, kernel, pixels, fast, bracket)
        times = measure.interleaved(sides, rounds=max(3, rounds // 3), seconds=0.2, pause=PAUSE)
        medians[n1, n2, pixels] = {side: timing.median for side, timing in times.items()}
        ratios.append(times["literal"].over(times["ours"]))
        detail.append(
            {
                "layer": f"{n1}→{n2} @ {pixels}×{pixels}",
                "seconds": medians[n1, n2, pixels],
                "relative_error": errors[-1],
                "bracket_width": widths[-1],
            }
        )
    total = {side: sum(medians[layer][side] for layer in layers) for side in medians[layers[0]]}
    torch_side = min((side for side in total if side.startswith("torch")), key=total.__getitem__)
    what = f"L of VGG16's 13 convolutions, {name} kernels"
    yield Figure(
        what,
        "literal formula in JAX, over the network",
        total["literal"] / total["ours"],
        goal=Goal("≥", 20),
        floor=total["literal"] * measure.matmul_rate() / flops(layers),
        detail={"seconds": total, "layers": detail},
    )
    yield Figure(what, "the same, worst layer", min(ratios), goal=Goal("≥", 8))
    yield Figure(what, "numpy fft2 + svd", total["numpy"] / total["ours"], goal=Goal("≥", 10))
    yield Figure(what, torch_side, total[torch_side] / total["ours"], goal=Goal("≥", 3))
    yield Figure(
        f"relative error of L, {name} kernels, worst layer",
        "numpy in float64",
        max(errors),
        "",
        Goal("≤", 1e-5),
    )
    yield Figure(
        f"width of the bracket of L, {name} kernels, worst layer",
        "the constant",
        100 * max(widths),
        " %",
        Goal("≤", 1),
    )
    for side, label in (("bracket", "the bracket"), ("refresh", "refresh of the bracket")):
        ratio = total[side] / total["ours"]
        yield Figure(f"{label} of L, {name} kernels, time", "the constant alone", ratio)


def _zero_padded(layers: Sequence[Any]) -> Iterator[Figure]:
    """What `operator_bracket` leaves open, by the number of pixels."""
    rng = np.random.default_rng(0)
    widths: dict[int, list[float]] = {}
    for draw in (he_normal, smooth):
        for n1, n2, pixels in dict.fromkeys(layers):
            A = ss.Conv(jnp.asarray(draw(rng, n1, n2), jnp.float32), (pixels, pixels))
            lower, upper = map(float, ss.lipschitz.operator_bracket(A))
            widths.setdefault(pixels, []).append((upper - lower) / lower)
    for pixels, found in widths.items():
        yield Figure(
            f"width of operator_bracket, zero padding, layers of {pixels}×{pixels} pixels, the worst",
            "its lower end",
            100 * max(found),
            " %",
            detail={"widths": found},
        )


def _sides(A: ss.Conv, kernel: np.ndarray, pixels: int, fast, bracket) -> dict[str, Any]:
    torch: Any = importlib.import_module("torch")

    torus = on_torus(kernel, pixels)
    in_jax, tensor = jnp.asarray(torus), torch.from_numpy(torus)
    # as a step of training moves a kernel: a thousandth of every tap
    noise = np.random.default_rng(1).standard_normal(kernel.shape).astype(np.float32)
    moved = ss.Conv(jnp.asarray(kernel * (1 + 1e-3 * noise)), A.spatial_shape)
    state = ss.lipschitz_state(A)
    return {
        "ours": lambda: fast(A),
        "bracket": lambda: bracket(A),
        "refresh": lambda: ss.lipschitz_refresh(moved, state),
        "literal": lambda: literal(in_jax),
        "numpy": lambda: in_numpy(torus),
        "torch rfft2 + svdvals": lambda: in_torch(tensor, singular_values=True),
        "torch rfft2 + eigvalsh": lambda: in_torch(tensor, singular_values=False),
    }


if __name__ == "__main__":
    main("lipschitz", benchmark, None)
