"""Reports on whole networks, as values and tables; the Flax rooms walk the models."""

from stochsolvers.reports._certificates import CertificateReport as CertificateReport
from stochsolvers.reports._certificates import LayerCertificate as LayerCertificate
from stochsolvers.reports._certificates import Observation as Observation
from stochsolvers.reports._certificates import certify as certify
from stochsolvers.reports._certificates import observe as observe
from stochsolvers.reports._lipschitz import LayerNorm as LayerNorm
from stochsolvers.reports._lipschitz import LipschitzReport as LipschitzReport
from stochsolvers.reports._lipschitz import lipschitz_report as lipschitz_report
