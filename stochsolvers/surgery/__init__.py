"""Solvers in the place of a trained network's layers: what `replace_layers` of the front ends reports.

Behind it is the analysis of one trace of the forward pass, in which a front end has marked its layers,
Dropouts and normalisations; it knows no Flax.
"""

from stochsolvers.surgery._report import LayerLeft as LayerLeft
from stochsolvers.surgery._report import ReplacedLayer as ReplacedLayer
from stochsolvers.surgery._report import ReplacementReport as ReplacementReport
from stochsolvers.surgery._where import Where as Where
