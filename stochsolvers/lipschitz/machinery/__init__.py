"""What makes lemma 2 fast and its brackets rigorous; the mathematics is one folder up.

`taps` writes a map as a few matrices and a table of phases (`written` has the matrix of a map without a
kernel), `grams` forms the blocks, `search` finds the one with the largest singular value, `blocks` decomposes
small ones, `top` has the products with the block that was found and the derivative of its norm, `hermitian`
and `spectra` hold the linear algebra with bounds on its round-off.
"""
