"""Certificates: margins, certified radii, certified robust accuracy, sound Lipschitz bounds."""

from .lipschitz import lipschitz_bound, lipschitz_bounds
from .radius import RADII, certified_radius, certified_robust_accuracy, margin
from .report import CertificationReport, full_precision, report
from .variance import batch_activation_variance

__all__ = [
    "RADII",
    "CertificationReport",
    "batch_activation_variance",
    "certified_radius",
    "certified_robust_accuracy",
    "full_precision",
    "lipschitz_bound",
    "lipschitz_bounds",
    "margin",
    "report",
]
