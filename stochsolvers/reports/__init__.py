"""Reports on whole networks, as values and tables; the Flax rooms walk the models."""

from stochsolvers.reports._certificates import CertificateReport as CertificateReport
from stochsolvers.reports._certificates import LayerCertificate as LayerCertificate
from stochsolvers.reports._certificates import Observation as Observation
from stochsolvers.reports._certificates import certificate_report as certificate_report
from stochsolvers.reports._certificates import certify as certify
from stochsolvers.reports._certificates import lost as lost
from stochsolvers.reports._certificates import numbered_calls as numbered_calls
from stochsolvers.reports._certificates import observe as observe
from stochsolvers.reports._lipschitz import LayerNorm as LayerNorm
from stochsolvers.reports._lipschitz import LipschitzReport as LipschitzReport
from stochsolvers.reports._lipschitz import Part as Part
from stochsolvers.reports._lipschitz import lipschitz_report as lipschitz_report
from stochsolvers.reports._lipschitz import norms_report as norms_report
from stochsolvers.reports._trace import mark_input as mark_input
from stochsolvers.reports._trace import mark_output as mark_output
from stochsolvers.reports._trace import trace as trace
