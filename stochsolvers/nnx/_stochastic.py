"""A module's own random stream, and the flag that `train()` and `eval()` flip."""

from typing import Any

from flax import nnx

from stochsolvers import _checks
from stochsolvers._typing import Array


class Stochastic(nnx.Module):
    """A random stream and the deterministic flag that `train()` and `eval()` flip."""

    def init_stochastic(self, deterministic: bool, rng_collection: str, rngs: Any) -> None:
        """Set the flag, and fork the named stream."""
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        if isinstance(rngs, nnx.Rngs):
            self.rngs = rngs[rng_collection].fork()
        elif isinstance(rngs, nnx.RngStream):
            self.rngs = rngs.fork()
        elif rngs is None:
            self.rngs = nnx.data(None)
        else:
            _checks.fail("rngs", "an nnx.Rngs, an nnx.RngStream or None", type(rngs).__name__)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` may set.

        Args:
          deterministic: no sampling.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def key(self, rngs: Any) -> Array:
        """The next key, of the streams of a call or the module's own."""
        source = self.rngs if rngs is None else rngs
        if source is None:
            _checks.fail(
                f"rngs of {type(self).__name__}",
                "a random stream at construction or call, or deterministic=True",
                None,
            )
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        return source() if isinstance(source, nnx.RngStream) else source
