"""What stands around a layer of a trained network: the analysis behind `replace_layers` of the front ends.

It reads one trace of the forward pass in which a front end has marked its layers, Dropouts and
normalisations, and knows no Flax.
"""

from stochsolvers.surgery._activations import activation as activation
from stochsolvers.surgery._flatten import mark_input as mark_input
from stochsolvers.surgery._flatten import mark_output as mark_output
from stochsolvers.surgery._fold import affine as affine
from stochsolvers.surgery._fold import folded as folded
from stochsolvers.surgery._fold import unfolded as unfolded
from stochsolvers.surgery._functions import Function as Function
from stochsolvers.surgery._report import LayerLeft as LayerLeft
from stochsolvers.surgery._report import ReplacedLayer as ReplacedLayer
from stochsolvers.surgery._report import ReplacementReport as ReplacementReport
from stochsolvers.surgery._survey import DropoutCall as DropoutCall
from stochsolvers.surgery._survey import LayerCall as LayerCall
from stochsolvers.surgery._survey import Survey as Survey
from stochsolvers.surgery._survey import survey as survey
from stochsolvers.surgery._where import Chosen as Chosen
from stochsolvers.surgery._where import Where as Where
from stochsolvers.surgery._where import select as select
