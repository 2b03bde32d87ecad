"""Pictures, on matplotlib (`pip install 'stochsolvers[plot]'`).

| function       | what it draws                                                                     |
|----------------|-----------------------------------------------------------------------------------|
| `convergence`  | gaps or residuals over the iterations of solvers, with what is certified          |
| `spectrum`     | all singular values of maps, in descending order                                  |
| `frequencies`  | the largest singular value of a convolution at every frequency                    |
| `activation`   | prox_{ηg} for several step sizes η, beside the activation that it stands for      |
| `table`        | a result for each method: every seed a dot, their mean a bar                      |
| `report`       | a report of the library, by its own `plot`                                        |

Each takes `ax`, matplotlib `Axes` to draw into (by default those of a new figure), and returns it, so that
titles and limits can be changed and pictures combined. Matplotlib is imported by the first call. New figures
are made with `STYLE`: `with matplotlib.rc_context(stochsolvers.plot.STYLE): ...` for figures of your own;
`COLORS` are told apart by colour-blind readers (Okabe and Ito, Color universal design, 2008), and lines
differ in their `DASHES` too.
"""

from stochsolvers.plot._activation import activation as activation
from stochsolvers.plot._axes import COLORS as COLORS
from stochsolvers.plot._axes import DASHES as DASHES
from stochsolvers.plot._axes import STYLE as STYLE
from stochsolvers.plot._convergence import convergence as convergence
from stochsolvers.plot._reports import certificates as certificates
from stochsolvers.plot._reports import changes as changes
from stochsolvers.plot._reports import norms as norms
from stochsolvers.plot._reports import report as report
from stochsolvers.plot._spectrum import frequencies as frequencies
from stochsolvers.plot._spectrum import spectrum as spectrum
from stochsolvers.plot._table import table as table
