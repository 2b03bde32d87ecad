"""Reports on whole networks, as values and tables; the Flax rooms walk the models."""

from stochsolvers.reports._certificates import CertificateReport as CertificateReport
from stochsolvers.reports._certificates import LayerCertificate as LayerCertificate
from stochsolvers.reports._certificates import Observation as Observation
from stochsolvers.reports._certificates import certificate_report as certificate_report
from stochsolvers.reports._certificates import numbered_calls as numbered_calls
from stochsolvers.reports._certificates import observe as observe
