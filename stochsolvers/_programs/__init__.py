"""A traced forward pass as one list of operations, in which the front ends have marked modules.

What `lipschitz_report` and `replace_layers` read; it knows no Flax.
"""

from stochsolvers._programs._calls import body as body
from stochsolvers._programs._calls import display_name as display_name
from stochsolvers._programs._flatten import Origin as Origin
from stochsolvers._programs._flatten import Program as Program
from stochsolvers._programs._flatten import Step as Step
from stochsolvers._programs._flatten import flatten as flatten
from stochsolvers._programs._marks import Kind as Kind
from stochsolvers._programs._marks import Mark as Mark
from stochsolvers._programs._marks import mark_input as mark_input
from stochsolvers._programs._marks import mark_output as mark_output
from stochsolvers._programs._marks import mark_side as mark_side
