"""What stands around a layer of a trained network: the analysis behind `replace_layers` of the front ends.

It reads one trace of the forward pass in which a front end has marked its layers, Dropouts and
normalisations, and knows no Flax.
"""

from stochsolvers.surgery._activations import activation as activation
from stochsolvers.surgery._flatten import mark_input as mark_input
from stochsolvers.surgery._flatten import mark_output as mark_output
from stochsolvers.surgery._functions import Function as Function
from stochsolvers.surgery._survey import DropoutCall as DropoutCall
from stochsolvers.surgery._survey import LayerCall as LayerCall
from stochsolvers.surgery._survey import Survey as Survey
from stochsolvers.surgery._survey import survey as survey
